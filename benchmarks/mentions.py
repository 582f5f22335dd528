"""Makes a multi-label data set from Wikigold: which kinds of entities a sentence mentions.

    python benchmarks/mentions.py wikigold.conll FOLDER

Writes FOLDER/train.jsonl and FOLDER/dev.jsonl, a sentence a line: {"text": …, "labels": […]} with
those of PER, LOC, ORG and MISC that occur in it, or an empty list. Equal sentences are on one side.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tinybert_jax.data.conll import read_tagged
from tinybert_jax.metrics.tagging import entities_of

DEV_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="wikigold.conll")
    parser.add_argument("folder", type=Path, help="for train.jsonl and dev.jsonl")
    args = parser.parse_args()
    rows = mentions(args.source)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("dev", True)):
        chosen = [row for row in rows if is_dev(row["text"]) == wanted]
        write(args.folder / f"{name}.jsonl", chosen)
        print(f"{args.folder / name}.jsonl: {len(chosen):,} sentences")


def mentions(source: Path) -> list[dict]:
    """One row a sentence: its words with spaces between, and the kinds of its entities, sorted."""
    found = read_tagged(source)
    assert found.tags is not None
    return [
        {"text": " ".join(words), "labels": sorted({entity.kind for entity in entities_of(tags)})}
        for words, tags in zip(found.words, found.tags, strict=True)
    ]


def is_dev(text: str) -> bool:
    """By the hash of the text, so that the split does not depend on the order of the rows."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) < DEV_SHARE * 2**64


def write(file: Path, rows: Iterable[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
