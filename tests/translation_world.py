"""A small translation: sentences in two languages, and a config that is quick to train."""

import yaml

PAIRS = [
    ("a dog runs", "ein Hund rennt"),
    ("a dog sleeps", "ein Hund schläft"),
    ("the cat sleeps here", "die Katze schläft hier"),
    ("a cat runs home", "eine Katze rennt heim"),
    ("the dog and the cat", "der Hund und die Katze"),
    ("here", "hier"),
]

STUDENT = {
    "num_hidden_layers": 1,
    "num_decoder_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
STAGE = {
    "num_steps": 12,
    "global_batch_size": 4,
    "max_length": 24,
    "batching": "pack",
    "learning_rate": 1e-2,
    "eval_every": 12,
}


def write_pairs(folder):
    """The files train.en and train.de."""
    for place, name in enumerate(("train.en", "train.de")):
        lines = [pair[place] for pair in PAIRS * 2]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_config(world, **sections):
    """A config of `write_pairs`'s files with other sections; its path."""
    tree = {
        "run_dir": str(world / "run"),
        "tokenizer": {"vocab_size": 90},
        "teacher": {
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
        "student": STUDENT,
        "task": {
            "kind": "translation",
            "train": str(world / "train.en"),
            "train_target": str(world / "train.de"),
            "dev": str(world / "train.en"),
            "dev_target": str(world / "train.de"),
        },
        "distillation": {
            "targets": "teacher",
            "num_beams": 2,
            "prediction": [{"term": "label"}, {"term": "logits", "form": "kl"}],
        },
        "finetune": {**STAGE, "label_smoothing": 0.1},
        "prediction": STAGE,
        "baseline": {**STAGE, "batching": "bucket"},
        **sections,
    }
    path = world / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)
