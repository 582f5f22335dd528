# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # A table of your own
#
# From a CSV file with a text and a label in each row to a small model in Hugging Face form. The table of this notebook is
# made of Python's own documentation: the first sentence that describes a function, and what the function is for.

# %%
import csv
import importlib
import inspect
import random

import tinybert_jax as tj

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"  # a BERT: a folder, or a name on the hub
STUDENT = "3l-192d"  # layers and width
SETTINGS = {}  # further settings of the run, by path

# %%
AREAS = {
    "files": ("os", "os.path", "shutil", "pathlib", "tempfile", "zipfile", "tarfile"),
    "network": ("socket", "ssl", "http.client", "urllib.request", "smtplib", "imaplib", "ftplib"),
    "numbers": ("math", "statistics", "random", "decimal", "fractions", "numbers"),
    "text": ("string", "re", "textwrap", "difflib", "unicodedata", "html.parser", "json"),
    "time": ("time", "datetime", "calendar", "sched", "zoneinfo", "timeit"),
}


def sentences(module_name):
    """The first lines of the docstrings in a module."""
    found, queue = set(), [importlib.import_module(module_name)]
    members = [member for _, member in inspect.getmembers(queue[0]) if inspect.isclass(member)]
    for owner in queue + members:
        for _, member in inspect.getmembers(owner):
            text = (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
            if callable(member) and 20 < len(text) < 300 and "(" not in text[:25]:
                found.add(text)
    return found


by_area = {area: set().union(*map(sentences, modules)) for area, modules in AREAS.items()}
common = [text for own in by_area.values() for text in own]
rows = [
    (text, area) for area, own in by_area.items() for text in sorted(own) if common.count(text) == 1
]
random.Random(0).shuffle(rows)
with open("sentences.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([("text", "label"), *rows])
print(len(rows), "rows, such as", rows[0])

# %% [markdown]
# One call: it holds out rows to judge with, fine-tunes the teacher, distils it, and trains the same small model without a
# teacher beside it. A call that was interrupted goes on where it was.

# %%
result = tj.distill("sentences.csv", TEACHER, STUDENT, run_dir="runs/sentences", settings=SETTINGS)
result.scores

# %% [markdown]
# The report has intervals, every class, the rows where teacher and student differ, and advice. The model is a folder for
# `transformers.AutoModelForSequenceClassification.from_pretrained` as well.

# %%
print(result.report, result.model)
answer = tj.pipeline("text-classification", result.model)
answer(["Return the day of the week.", "Copy a directory tree."])
