# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Questions about a text
#
# The answer is a part of the text, found by a model that was trained on question answering.

# %%
import tinybert_jax as tj

MODEL = "distilbert/distilbert-base-uncased-distilled-squad"  # a folder, or a name on the hub

TEXT = """
Distillation trains a small model, the student, on what a large one, the teacher, says of a text. In 2015 Geoffrey Hinton,
Oriol Vinyals and Jeff Dean let students learn from the probabilities of all classes, which they softened with a temperature.
TinyBERT also compares hidden states and attention of both models. Its general stage reads plain text, and its
task-specific stages read the text of the task.
"""

# %%
ask = tj.pipeline("question-answering", MODEL)
questions = [
    "Who let students learn from the probabilities of all classes?",
    "What does the general stage read?",
    "What does TinyBERT compare?",
]
answers = ask(question=questions, context=TEXT)
for question, found in zip(questions, answers):
    print(f"{question}\n    {found['answer']}  ({found['score']:.2f})")

# %% [markdown]
# The place of an answer is told too, in characters of the text.

# %%
for found in answers:
    start, end = found["start"], found["end"]
    print(
        repr(TEXT[max(start - 30, 0) : start] + "[" + TEXT[start:end] + "]" + TEXT[end : end + 30])
    )

# %% [markdown]
# A whole file from the command line:
#
# ```bash
# tinybert ask MODEL text.txt -q "What does the general stage read?"
# ```
#
# A smaller model of your own: `configs/distill/squad.yaml` distils one from questions in the form of SQuAD.
