"""A world in which everything is right, for tests that spoil one thing of it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tinybert_jax import cli
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.huggingface.head import Head
from tinybert_jax.models.heads import make_classifier, make_encoder
from tinybert_jax.settings.sizes import ModelConfig

TEXTS = ["a fine film", "a dull film", "tea and toast", "toast and jam and more tea"] * 3
LABELS = ["neg", "pos"] * 6
STAGE = {"num_steps": 1, "global_batch_size": 8, "max_length": 16, "learning_rate": 1e-3}
STUDENT = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Tiny BERT folders, never changed: `classifier` (always answers neg), `encoder` and others."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_wordpiece(TEXTS, vocab_size=60)
    sizes = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    params = make_classifier(sizes, 2)[1](jax.random.key(0))
    params["classifier"] = jax.tree.map(np.zeros_like, params["classifier"])
    head = Head("SequenceClassification", "single_label_classification", ("neg", "pos"))
    save_model(folder / "classifier", params, sizes, tokenizer, head=head)
    save_model(folder / "encoder", params["encoder"], sizes, tokenizer)
    wider = sizes.model_copy(update={"hidden_size": 24})
    init = make_classifier(wider, 2)[1]
    save_model(folder / "wider", init(jax.random.key(0)), wider, tokenizer, head=head)
    # As many pieces, but others.
    other = train_wordpiece([text.replace("m", "x") for text in TEXTS], vocab_size=60)
    sizes = sizes.model_copy(update={"vocab_size": len(other)})
    init = make_encoder(sizes)[1]
    save_model(folder / "other_vocabulary", init(jax.random.key(0)), sizes, other)
    return folder


class World:
    """A folder with data, configs and copies of models, and the command run in it."""

    def __init__(self, folder: Path, models: Path, capfd):
        self.folder, self.models, self.capfd = folder, models, capfd
        self.run_dir = folder / "run"
        self.train = self.table("train.tsv")
        self.dev = self.table("dev.tsv")

    def table(self, name: str, texts=TEXTS, labels=LABELS, header="text\tlabel") -> str:
        rows = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
        return self.file(name, "\n".join([header, *rows]) + "\n")

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def model(self, name: str, **settings) -> Path:
        """A copy that a test may spoil; `settings` go into its config.json, None removes."""
        copy = self.folder / f"{name}-copy"
        copy.mkdir()
        for file in (self.models / name).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        raw = json.loads((copy / "config.json").read_text()) | settings
        raw = {key: value for key, value in raw.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(raw))
        return copy

    def config(self, *stages: str, **sections) -> str:
        """A config that is right but for what `sections` changes, one mapping each."""
        tree = {
            "run_dir": str(self.run_dir),
            "teacher": {"path": str(self.models / "encoder")},
            "task": {"train": self.train, "dev": self.dev},
            **{stage: dict(STAGE) for stage in stages},
        }
        if set(stages) - {"finetune", "pretrain"}:
            tree["student"] = dict(STUDENT)
        for name, value in sections.items():
            changes_section = isinstance(value, dict) and isinstance(tree.get(name), dict)
            tree[name] = {**tree[name], **value} if changes_section else value
        return self.file("config.yaml", yaml.safe_dump(tree, sort_keys=False))

    def distil(self, **sections) -> str:
        """A distillation from a teacher that already knows the task."""
        teacher = {"teacher": {"path": str(self.models / "classifier")}}
        return self.config("intermediate", "prediction", **{**teacher, **sections})

    def fails(self, *argv: str, naming: tuple[str, ...], with_status: int = 2) -> str:
        """Runs the command; checks status, message and that no file came, went or changed."""
        before = self.content()
        self.capfd.readouterr()
        try:
            status = cli.main(argv)
        except SystemExit as exit:  # argparse's own way
            status = exit.code
        message = self.capfd.readouterr().err
        assert status == with_status
        assert "Traceback" not in message
        assert message.startswith("tinybert: ") and message.count("tinybert: ") == 1
        for part in naming:
            assert part in message
        assert self.content() == before
        return message

    def content(self) -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")}


@pytest.fixture
def world(tmp_path, models, capfd) -> World:
    return World(tmp_path, models, capfd)


def change(folder: Path, name: str, array: np.ndarray) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), name: array}
    save_file(tensors, file, metadata={"format": "pt"})
