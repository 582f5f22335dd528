# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # How small may it be?
#
# Several students learn from one teacher in the same batches; another size costs only its own training. The table is the
# one of `own_csv`.

# %%
import matplotlib.pyplot as plt

import tinybert_jax as tj

DATA = "sentences.csv"
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"  # a folder, or a name on the hub
SIZES = {"4l-384d": (4, 384), "3l-384d": (3, 384), "3l-192d": (3, 192), "2l-96d": (2, 96)}
SETTINGS = {}  # further settings of the run, by path

# %%
students = {
    name: {"num_hidden_layers": layers, "hidden_size": width}
    for name, (layers, width) in SIZES.items()
}
settings = {"student": None, "students": students, **SETTINGS}
result = tj.distill(DATA, TEACHER, run_dir="runs/sizes", settings=settings)
result

# %% [markdown]
# Score against time for one text. A model is worth having where no other one is both better and faster.

# %%
metric = result.results["metric"]
models = [model for model in result.results["models"] if "latency_ms" in model]
figure, axes = plt.subplots(figsize=(6, 4))
for model in models:
    place = model["latency_ms"]["median"], model["metrics"][metric]
    axes.scatter(*place, marker="s" if model["role"] == "teacher" else "o")
    axes.annotate(
        f"{model['role']} {model['name']}", place, textcoords="offset points", xytext=(6, 4)
    )
axes.set_xlabel("milliseconds for one text")
axes.set_ylabel(metric)
axes.set_xscale("log")
figure.tight_layout()
figure.savefig("sizes.png", dpi=150)
