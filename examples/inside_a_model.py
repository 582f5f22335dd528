# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Inside a teacher and its student
#
# What distillation compares: the attention of a student's layer beside that of the teacher's layer that it learns from. The
# models are those of the run in `own_csv`.

# %%
import matplotlib.pyplot as plt
import numpy as np

from tinybert_jax import TinyBertForSequenceClassification, TinyBertModel

TEACHER, STUDENT = "runs/sentences/models/finetune", "runs/sentences/hf"
SENTENCE = "Return the number of seconds since the epoch."

# %%
teacher, student = (TinyBertModel.from_pretrained(folder) for folder in (TEACHER, STUDENT))
print(teacher, student, sep="\n")
words = teacher.tokenizer.convert_ids_to_tokens(teacher.tokenizer(SENTENCE)["input_ids"])


def attention(model, layer):
    """[heads, from, to]: softmax of queries times keys of a layer, from 1."""
    outputs = model(SENTENCE)
    queries, keys = outputs.attention_queries[layer - 1][0], outputs.attention_keys[layer - 1][0]
    scores = np.einsum("thk,shk->hts", queries, keys) / queries.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# %% [markdown]
# The last layers, mean over heads.

# %%
depths = [model.config.num_hidden_layers for model in (teacher, student)]
figure, both = plt.subplots(1, 2, figsize=(9, 4.5))
for axes, model, depth, name in zip(both, (teacher, student), depths, ("teacher", "student")):
    axes.imshow(attention(model, depth).mean(0), cmap="Blues", vmin=0)
    axes.set_title(f"{name}, layer {depth} of {depth}")
    axes.set_xticks(range(len(words)), words, rotation=90)
    axes.set_yticks(range(len(words)), words)
figure.tight_layout()
figure.savefig("attention.png", dpi=150)

# %% [markdown]
# How alike the hidden states of the first token are, layer by layer: the cosine between all pairs of sentences is compared,
# so that models of other widths can be.

# %%
SENTENCES = [
    SENTENCE,
    "Return the current time.",
    "Remove a directory and all that is in it.",
    "Open a connection to the server.",
    "Return the square root of a number.",
    "Split the text into lines.",
]


def cosines(states):
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    return (units @ units.T)[np.triu_indices(len(units), 1)]


states = [
    [np.asarray(s)[:, 0] for s in model(SENTENCES).hidden_states] for model in (teacher, student)
]
for layer in range(1, depths[1] + 1):
    theirs = layer * depths[0] // depths[1]
    alike = np.corrcoef(cosines(states[0][theirs]), cosines(states[1][layer]))[0, 1]
    print(f"student's layer {layer}, teacher's layer {theirs}: correlation {alike:.2f}")

# %% [markdown]
# And what both say of it:

# %%
for folder in (TEACHER, STUDENT):
    model = TinyBertForSequenceClassification.from_pretrained(folder)
    logits = np.asarray(model(SENTENCE).logits)[0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = [model.config.id2label[place] for place in range(len(shares))]
    print({name: round(float(share), 2) for name, share in zip(names, shares)})
