"""Makes two data sets from Wikigold, which has no split of its own: a fifth is the dev set.

    python benchmarks/wikigold.py wikigold.conll FOLDER

Tagging: FOLDER/train.conll and dev.conll, the sentences with their tags. Multi-label: train.jsonl
and dev.jsonl, a sentence a line, {"text": …, "labels": […]} with those of PER, LOC, ORG and MISC
that the sentence mentions, or an empty list. Both data sets have the same split; equal sentences
are on one side of it.
"""

import argparse
import hashlib
import json
from pathlib import Path

from tinybert_jax.data.conll import TaggedText, read_tagged
from tinybert_jax.metrics.tagging import entities_of

DEV_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="wikigold.conll")
    parser.add_argument("folder", type=Path, help="for train and dev, .conll and .jsonl")
    args = parser.parse_args()
    found = read_tagged(args.source)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("dev", True)):
        part = select(found, wanted)
        write_tagged(args.folder / f"{name}.conll", part)
        write_mentions(args.folder / f"{name}.jsonl", part)
        print(f"{args.folder / name}.conll and .jsonl: {len(part.words):,} sentences")


def select(found: TaggedText, in_dev: bool) -> TaggedText:
    """The sentences of one side of the split."""
    assert found.tags is not None
    chosen = [
        row
        for row in zip(found.words, found.tags, found.places, strict=True)
        if is_dev(" ".join(row[0])) == in_dev
    ]
    words, tags, places = map(list, zip(*chosen, strict=True))
    return TaggedText(words, tags, places)


def is_dev(text: str) -> bool:
    """By the hash of the text, so that the split does not depend on the order of the rows."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) < DEV_SHARE * 2**64


def write_tagged(file: Path, text: TaggedText) -> None:
    """One word and its tag a line, a blank line after each sentence."""
    assert text.tags is not None
    sentences = (
        "".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True))
        for words, tags in zip(text.words, text.tags, strict=True)
    )
    file.write_text("\n".join(sentences), encoding="utf-8")


def write_mentions(file: Path, text: TaggedText) -> None:
    """The words with spaces between them, and the kinds of their entities, sorted."""
    assert text.tags is not None
    rows = (
        {"text": " ".join(words), "labels": sorted({entity.kind for entity in entities_of(tags)})}
        for words, tags in zip(text.words, text.tags, strict=True)
    )
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
