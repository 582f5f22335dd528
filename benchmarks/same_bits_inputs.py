"""What the runs that same_bits.py compares read: text, configs, environment. All small and fixed.

A change of this file changes what is computed: outputs that are kept from before are made anew.
"""

import random
from pathlib import Path
from typing import Any

RUNS = {
    "six": "six stages",
    "family": "two sizes, two seeds",
    "minilmv2": "minilmv2",
    "distilbert": "distilbert",
    "stores": "token stores",
    "regression": "regression",
}
KILLED_IN = {"six": "finetune", "family": "prediction"}  # the stage of each run that is resumed
KILLED_AT = 12  # the step logged before the kill, between two checkpoints
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
WORDS = {
    "sea": "wave tide harbour sail anchor gull salt deck storm shore".split(),
    "kitchen": "oven spoon butter flour kettle onion plate knife soup bread".split(),
}
FILLER = ["the", "a", "was", "and", "near", "with", "old", "new"]
TEACHER = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}
WIDE = {**SMALL, "hidden_size": 16}
SHORT = {
    "num_steps": 24,
    "global_batch_size": 8,
    "max_length": 16,
    "learning_rate": 5e-3,
    "log_every": 4,
    "save_every": 8,
}
JUDGED = {**SHORT, "eval_every": 12}


def write_text(folder: Path) -> None:
    """Writes labelled text of two kinds, pairs with numbers, and documents; always the same."""
    rng = random.Random(0)

    def sentence(label: str) -> str:
        return " ".join(rng.choice(WORDS[label] + FILLER) for _ in range(rng.randint(4, 14)))

    def share(text: str) -> float:
        return round(sum(word in WORDS["sea"] for word in text.split()) / len(text.split()), 3)

    for name, count in (("train", 160), ("dev", 40)):
        rows = [(sentence(label), label) for label in WORDS for _ in range(count // 2)]
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + lines)
        pairs = [(text[: len(text) // 2], text[len(text) // 2 :], share(text)) for text, _ in rows]
        lines = "".join(f"{first}\t{second}\t{number}\n" for first, second, number in pairs)
        (folder / f"{name}-numbers.tsv").write_text("text\tother\tlabel\n" + lines)
    documents = [". ".join(sentence(label) for _ in range(6)) for label in WORDS for _ in range(30)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))


def six_stages(inputs: Path) -> dict[str, Any]:
    """Gives the config of the run that tests/recipes/test_end_to_end.py has."""
    stage = {**SHORT, "num_steps": 80}
    phases = [{"share": 0.1, "max_length": 8}, {"share": 0.2, "global_batch_size": 16}]
    judged = {**stage, "eval_every": 10}
    packed = {"learning_rate": 1e-2, "average_decay": 0.9, "batching": "pack"}
    return {
        "tokenizer": {"vocab_size": 120},
        "corpus": {"files": [str(inputs / "corpus.txt")], "heldout_share": 0.2},
        "task": {"train": str(inputs / "train.tsv"), "dev": str(inputs / "dev.tsv")},
        "teacher": TEACHER,
        "student": SMALL,
        "pretrain": {**stage, "learning_rate": 1e-3, "eval_every": 40, "phases": phases},
        "finetune": {**judged, **packed},
        "general": {**stage, "phases": phases[:1]},
        "intermediate": stage,
        "prediction": judged,
        "baseline": judged,
    }


def other_runs(inputs: Path, teacher: Path) -> dict[str, dict[str, Any]]:
    """Gives the configs of the runs that start from the teacher which BEFORE pretrained."""
    given = {
        "teacher": {"path": str(teacher)},
        "corpus": {"files": [str(inputs / "corpus.txt")]},
        "task": {"train": str(inputs / "train.tsv"), "dev": str(inputs / "dev.tsv")},
    }
    numbers = {name: str(inputs / f"{name}-numbers.tsv") for name in ("train", "dev")}
    averaged = {"average_decay": 0.5, "gradient_accumulation_steps": 2}
    family = {
        "small": {**SMALL, "init": "teacher_embeddings"},
        "wide": {**WIDE, "init": "teacher_layers", "init_layers": "top"},
    }
    pairs = {"pair_weight": 1, "mask_unit": "whole_word", "position_init": "sinusoid"}
    return {
        "family": {
            **given,
            "students": family,
            "num_seeds": 2,
            "distillation": {"projection": "per_layer", "teacher_margin": -1},
            "finetune": {**JUDGED, "num_seeds": 2},
            "general": SHORT,
            "intermediate": {**SHORT, "batching": "pack"},
            "prediction": {**JUDGED, **averaged},
            "baseline": {**JUDGED, "patience": 1},
        },
        "minilmv2": {
            **given,
            "student": SMALL,
            "distillation": {"preset": "minilmv2", "general": [{"term": "relation", "heads": 4}]},
            "general": {**SHORT, "batching": "pack"},
            "prediction": JUDGED,
        },
        "distilbert": {
            **given,
            "student": WIDE,
            "distillation": {"preset": "distilbert"},
            "compute": {"unroll_layers": True},
            "general": SHORT,
            "prediction": {**JUDGED, "schedule": "cosine"},
        },
        "stores": {
            "teacher": TEACHER,
            "tokenizer": {"path": str(teacher)},
            "corpus": {"stores": {"store": 1}},
            "pretrain": {**SHORT, **pairs},
        },
        "regression": {
            **given,
            "student": SMALL,
            "task": {**numbers, "text_pair": "other", "regression": True},
            "distillation": {"keep_logits": True},
            "finetune": JUDGED,
            "intermediate": SHORT,
            "prediction": JUDGED,
        },
    }


def token_store(inputs: Path, teacher: Path) -> dict[str, Any]:
    """Gives the settings of `data prepare` for the store that the run `stores` reads."""
    return {
        "output": "store",
        "sources": [str(inputs / "corpus.txt")],
        "tokenizer": str(teacher),
        "mode": "pairs",
        "width": 16,
        "chunk_bytes": 2048,
        "workers": 1,
    }
