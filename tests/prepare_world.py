"""A text, a tokenizer and a config of `data prepare`; helpers that compare stores."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from transformers import BertTokenizer

from tests.reference import write_vocab
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.huggingface.hub import load_tokenizer
from tinybert_jax.tokens import prepare
from tinybert_jax.tokens.store import INDEX, partial_of

ROOT = Path(__file__).parent.parent


def make_text(num_documents, seed=0):
    """Documents of sentences of made-up words; a fixed text for a seed."""
    rng = random.Random(seed)
    documents = []
    for _ in range(num_documents):
        lines = []
        for _ in range(rng.randint(1, 9)):
            words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(12)]
            lines.append(" ".join(words).capitalize() + ".")
        documents.append("\n".join(lines))
    return "\n\n".join(documents) + "\n"


class World:
    """A folder with a text, a tokenizer and a config."""

    def __init__(self, folder):
        self.folder = folder
        self.text, self.tokenizer = folder / "text.txt", folder / "tokenizer"
        self.text.write_text(make_text(300))
        BertTokenizer.from_pretrained(str(write_vocab(folder / "vocab"))).save_pretrained(
            str(self.tokenizer)
        )
        self.settings = {
            "output": str(folder / "store"),
            "sources": [str(self.text)],
            "tokenizer": str(self.tokenizer),
            "width": 32,
            "chunk_bytes": 8000,
            "shard_rows": 200,
            "workers": 1,
        }
        self.config = folder / "prepare.yaml"
        self.config.write_text(yaml.safe_dump(self.settings))

    def prepare(self, **settings):
        loaded = PrepareConfig(**self.settings | settings)
        return prepare.prepare(loaded, load_tokenizer(loaded.tokenizer))

    def command(self, output, **settings):
        given = [f"{name}={value}" for name, value in settings.items()]
        arguments = ["data", "prepare", str(self.config), f"output={output}", *given]
        return [sys.executable, "-m", "tinybert_jax", *arguments]

    def refused(self, *parts, **settings):
        with pytest.raises(ValueError) as caught:
            self.prepare(**settings)
        for part in (": expected ", "; got ", "; fix: ", *parts):
            assert part in str(caught.value)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def same(first, second):
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name


def count_entries(output):
    index = partial_of(output) / INDEX
    return index.read_bytes().count(b"\n") if index.is_file() else 0


def unfinish(output):
    """Turns a finished store into an unfinished store of the first three chunks."""
    folder = output.rename(partial_of(output))
    facts = json.loads((folder / "manifest.json").read_text())
    kept = {name: facts[name] for name in ("settings", "tokenizer_sha256", "sources")}
    (folder / "identity.json").write_text(json.dumps(kept))
    index = folder / INDEX
    index.write_text("".join(index.read_text().splitlines(True)[:3]))
    (folder / "manifest.json").unlink()
