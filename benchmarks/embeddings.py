"""Sentence vectors of model folders: intents found by search, and texts embedded per second.

    python benchmarks/embeddings.py intents $TINYBERT_DATA/cls/banking77/train.csv MODEL …
    python benchmarks/embeddings.py speed $TINYBERT_DATA/mlm/wikipedia_squad_train.txt MODEL

intents: a fifth of the rows, by hash of the text, are questions; the answer to a question is the
intent of the closest of the other rows. Accuracy@1 with its 95 % interval, and the share of the
first model's.

speed: the file's text, cut at the ends of sentences, is embedded and searched with 100 of them; the
same in sentence-transformers where it is installed. Each side is a process of its own. Its time has
the loading of the model in it and, of ours, the compilation. `--rows` shortens both.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import time

NUM_QUERIES = 100
LEAST = 20  # characters of a sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["intents", "speed", "ours", "theirs"])
    parser.add_argument("data")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--rows", type=int, help="about so many; default: all, or 100,000 sentences"
    )
    parser.add_argument("--text", default="text", help="column of the questions")
    parser.add_argument("--label", default="category", help="column of their intents")
    args = parser.parse_args()
    if args.what == "intents":
        measure_intents(args)
    elif args.what == "speed":
        compare_speed(args)
    else:
        side = {"ours": run_ours, "theirs": run_theirs}[args.what]
        print(json.dumps(side(args.models[0], read_sentences(args.data, args.rows or 100_000))))


def measure_intents(args: argparse.Namespace) -> None:
    import numpy as np

    from tinybert_jax.inference.predict import embed
    from tinybert_jax.inference.search import nearest, read_texts
    from tinybert_jax.metrics.intervals import interval, resampled_scores

    found = read_texts(args.data, args.text, args.label)
    every = slice(None, None, max(len(found.texts) // (args.rows or len(found.texts)), 1))
    texts, intents = found.texts[every], np.array((found.labels or [])[every])
    is_asked = np.array([hashlib.sha256(text.encode()).digest()[0] < 256 / 5 for text in texts])
    print(f"{is_asked.sum():,} questions, {(~is_asked).sum():,} rows to search")
    first = None
    for model in args.models:
        vectors = embed(model, texts)
        _, places = nearest(vectors[~is_asked], vectors[is_asked], 1)
        right = (intents[~is_asked][places[:, 0]] == intents[is_asked])[:, None].astype(float)
        drawn = resampled_scores(lambda rows: {"accuracy": float(rows.mean())}, right)
        low, high = interval(drawn["accuracy"])
        score = float(right.mean())
        first = first or score
        print(f"{model}: accuracy@1 {score:.4f} [{low:.4f}, {high:.4f}], {score / first:.1%}")


def compare_speed(args: argparse.Namespace) -> None:
    sides = ["ours"]
    if importlib.util.find_spec("sentence_transformers"):
        sides.append("theirs")
    else:
        print("sentence-transformers is not installed here")
    rates = {}
    for side in sides:
        command = [sys.executable, __file__, side, args.data, args.models[0]]
        command += ["--rows", str(args.rows or 100_000)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        rates[side] = found["sentences"] / found["embed_seconds"]
        print(
            f"{side}: {found['sentences']:,} sentences in {found['embed_seconds']:.1f} s, "
            f"{rates[side]:.0f} sentences/s; {NUM_QUERIES} searches in "
            f"{found['search_seconds'] * 1000:.0f} ms"
        )
    if len(rates) == 2:
        print(f"ratio {rates['ours'] / rates['theirs']:.2f}")


def read_sentences(path: str, most: int) -> list[str]:
    """The first different sentences of a file of plain text."""
    with open(path, encoding="utf-8") as file:
        parts = re.split(r"(?<=[.!?]) +|\n", file.read())
    texts = dict.fromkeys(part.strip() for part in parts if len(part.strip()) >= LEAST)
    return list(texts)[:most]


def run_ours(model: str, texts: list[str]) -> dict[str, float]:
    """Embeds and searches; the time has loading and compilation in it, as the command has."""
    from tinybert_jax.inference.predict import embed
    from tinybert_jax.inference.search import nearest

    start = time.perf_counter()
    vectors = embed(model, texts)
    embedded = time.perf_counter()
    nearest(vectors, vectors[:NUM_QUERIES], 10)
    return _seconds(texts, embedded - start, time.perf_counter() - embedded)


def run_theirs(model: str, texts: list[str]) -> dict[str, float]:
    from sentence_transformers import SentenceTransformer, util

    start = time.perf_counter()
    vectors = SentenceTransformer(model, device="cpu").encode(texts, batch_size=64)
    embedded = time.perf_counter()
    util.semantic_search(vectors[:NUM_QUERIES], vectors, top_k=10)
    return _seconds(texts, embedded - start, time.perf_counter() - embedded)


def _seconds(texts: list[str], embedded: float, searched: float) -> dict[str, float]:
    return {"sentences": len(texts), "embed_seconds": embedded, "search_seconds": searched}


if __name__ == "__main__":
    main()
