"""Text, labels, a corpus and a pretrained teacher, as small as they go."""

from pathlib import Path
from typing import Any

import jax
import yaml

from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.models.heads import make_masked_lm
from tinybert_jax.settings.sizes import ModelConfig

TEXTS = ["a fine film with a sea", "a dull film", "tea and toast", "toast and jam and tea"] * 6
LABELS = ["pos", "neg"] * 12

STAGE = {"global_batch_size": 8, "max_length": 16, "batching": "pad", "learning_rate": 1e-2}
TEACHER = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
STUDENT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}


def write_inputs(folder: Path, **sizes: int) -> tuple[dict, ModelConfig, Any]:
    """rows.tsv, corpus.txt and teacher/, for masked words: its parameters, sizes, tokenizer."""
    rows = "".join(f"{text}\t{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    (folder / "rows.tsv").write_text("text\tlabel\n" + rows)
    (folder / "corpus.txt").write_text("\n\n".join(TEXTS))
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    sizes = {"max_position_embeddings": 16, **sizes}
    config = ModelConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    params = make_masked_lm(config)[1](jax.random.key(0))
    save_model(folder / "teacher", params, config, tokenizer)
    return params, config, tokenizer


def write_config(file: Path, inputs: Path, run_dir: Path, **sections: Any) -> str:
    """A config of a run on those inputs."""
    rows = str(inputs / "rows.tsv")
    tree = {
        "run_dir": str(run_dir),
        "teacher": {"path": str(inputs / "teacher")},
        "corpus": {"files": [str(inputs / "corpus.txt")]},
        "task": {"train": rows, "dev": rows},
        **sections,
    }
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(file)
