"""Runs configs/own-text.yaml on so many rows of a data set, and prints its line of the table.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/cells.py trec 1000 \
        [--runs runs/cells] [key.path=value …]

The rows of the data set are put in an order of their own (by hash): the last quarter, at most
2,000, is the dev set, which chooses nothing, and the first are trained on. SST-2 has its own dev
set of 872 sentences, as the rows to train on are phrases of each other. The recipe was tuned with
`--tune`, whose dev set is the rows that follow those trained on. STS-B (scored pairs) and clinc150
have their own dev sets too; MRPC is pairs. Two students, 3 × 384 and 3 × 192, three seeds. A
finished cell is only printed. Scores are means over seeds, in brackets 95 % intervals over the dev
rows.
"""

import argparse
import csv
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NUM_DEV = 2000
FURTHER, NUM_FURTHER = "further.tsv", 10_000  # text without labels, for the arms that use it
SIZES = {"3l-384d": 384, "3l-192d": 192}
STUDENTS = {name: {"num_hidden_layers": 3, "hidden_size": size} for name, size in SIZES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", choices=list(READERS))
    parser.add_argument("rows", type=int)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/cells"))
    parser.add_argument("--tune", action="store_true", help="dev rows that no table reports")
    args = parser.parse_intermixed_args()
    folder = args.runs / f"{args.data}-{args.rows}{'-tune' if args.tune else ''}"
    config, settings = cell_settings(args.data, args.rows, folder, is_tuning=args.tune)
    file = folder / "run" / "results.json"
    if not file.is_file():
        command = [sys.executable, "-m", "tinybert_jax", "run", config, *settings, *args.settings]
        subprocess.run([*command, f"run_dir={file.parent}"], check=True)
    print_line(args.data, args.rows, json.loads(file.read_text()))


def cell_settings(
    data: str, num_rows: int, folder: Path, *, is_tuning: bool = False
) -> tuple[str, list[str]]:
    """(config, settings) of a cell, whose text is written into `folder`."""
    train, dev = split(data, num_rows, is_tuning=is_tuning)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.tsv", train)
    write(folder / "dev.tsv", dev)
    write(folder / FURTHER, further(data, [*train, *dev]))
    labels = sorted({label for _, label in [*train, *dev]})
    kind = "task.kind=regression" if data in SCORED else f"task.labels={json.dumps(labels)}"
    pairs = ["task.text_pair=text_pair"] if data in PAIRS else []
    return "configs/own-text.yaml", [
        f"task.train={folder / 'train.tsv'}",
        f"task.dev={folder / 'dev.tsv'}",
        "task.dev_share=null",
        kind,
        *pairs,
        "num_seeds=3",
        f"students={json.dumps(STUDENTS)}",
    ]


def split(
    data: str, num_rows: int, *, is_tuning: bool
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(rows to train on, dev rows), each (text, label), in the order of their hashes.

    The two texts of a pair have a tab between them.
    """
    folder = Path(os.environ["TINYBERT_DATA"])
    labels = dict(READERS[data](folder))  # a text that occurs twice counts once
    rows = sorted(labels.items(), key=lambda row: _digest(row[0]))
    if data in DEV_READERS:
        dev = list(DEV_READERS[data](folder))
    else:
        num_dev = min(NUM_DEV, len(rows) // 4)
        rows, dev = rows[:-num_dev], rows[-num_dev:]
    if is_tuning:
        dev = rows[num_rows : num_rows + NUM_DEV]
    wanted = num_rows + is_tuning  # one dev row at the least
    if len(rows) < wanted:
        raise SystemExit(f"{data}: expected {wanted} rows beside the dev rows, got {len(rows)}")
    return rows[:num_rows], dev


def further(data: str, used: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows whose labels no arm reads: the first of those not `used`; for pairs, of QQP and SNLI."""
    folder, known = Path(os.environ["TINYBERT_DATA"]), {text for text, _ in used}
    reader = _subsets if data in PAIRS else READERS[data]
    rows = sorted(dict(reader(folder)).items(), key=lambda row: _digest(row[0]))
    return [row for row in rows if row[0] not in known][:NUM_FURTHER]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(file: Path, rows: list[tuple[str, str]]) -> None:
    names = ["text", "text_pair"][: 2 if rows and "\t" in rows[0][0] else 1]
    lines = (f"{text}\t{label}\n" for text, label in rows)
    file.write_text("\t".join([*names, "label"]) + "\n" + "".join(lines), encoding="utf-8")


def print_line(data: str, num_rows: int, results: dict) -> None:
    metric, minutes = results["metric"], sum(results["seconds"].values()) / 60
    print(f"| data, rows | model | {metric} | gap closed | minutes |\n|---|---|---|---|---|")
    for model in results["models"]:
        low, high = model["intervals"][metric]
        shown = f"{model['metrics'][metric]:.4f} [{low:.4f}, {high:.4f}]"
        if model["role"] != "teacher" and "deviation" in model:
            shown += f" ± {model['deviation'][metric]:.4f}"
        is_student = model["role"] == "student"
        compared = results["comparisons"].get(model["name"], {}) if is_student else {}
        closed = compared.get("gap_closed")
        gap, name = f"{closed['value']:.0%}" if closed else "", f"{model['role']} {model['name']}"
        print(f"| {data}, {num_rows:,} | {name} | {shown} | {gap} | {minutes:.1f} |")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _trec(folder: Path) -> Iterator[tuple[str, str]]:
    for line in (folder / "cls/trec/train.raw").read_text(encoding="latin-1").splitlines():
        label, text = line.split(" ", 1)
        yield _plain(text), label.split(":")[0]


def _banking(folder: Path) -> Iterator[tuple[str, str]]:
    with (folder / "cls/banking77/train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield _plain(row["text"]), row["category"]


def _intents(folder: Path, part: str = "train") -> Iterator[tuple[str, str]]:
    file = folder / "cls/clinc150/train_val.json"
    for text, label in json.loads(file.read_text(encoding="utf-8"))[part]:
        yield _plain(text), label


def _sms(folder: Path) -> Iterator[tuple[str, str]]:
    for line in (folder / "cls/sms_spam/train.tsv").read_text(encoding="utf-8").split("\n"):
        label, tab, text = line.partition("\t")
        if tab and _plain(text):
            yield _plain(text), label


def _news(folder: Path) -> Iterator[tuple[str, str]]:
    for line in (folder / "cls/agnews/train.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            yield _plain(row["text"]), row["label"]


def _reviews(folder: Path, file: str = "train.tsv") -> Iterator[tuple[str, str]]:
    for line in (folder / "cls/sst2" / file).read_text(encoding="utf-8").split("\n")[1:]:
        text, tab, label = line.rpartition("\t")
        if tab and _plain(text):
            yield _plain(text), label


def _paraphrases(folder: Path) -> Iterator[tuple[str, str]]:
    file = folder / "glue/MRPC/msr_paraphrase_train.txt"
    for line in file.read_text(encoding="utf-8").split("\n")[1:]:
        if line:
            label, _, _, text, text_pair = line.split("\t")
            yield f"{_plain(text)}\t{_plain(text_pair)}", label


def _similar(folder: Path, file: str = "sts-train.tsv") -> Iterator[tuple[str, str]]:
    for line in (folder / "glue/STS-B" / file).read_text(encoding="utf-8").split("\n"):
        if line:
            score, text, text_pair = line.split("\t")[4:7]
            yield f"{_plain(text)}\t{_plain(text_pair)}", score


def _subsets(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("QQP", "SNLI"):
        rows = json.loads((folder / f"glue/{name}/sub_train.json").read_text(encoding="utf-8"))
        for row in rows.values():
            yield f"{_plain(row['text_a'])}\t{_plain(row['text_b'])}", row["label"]


READERS = {
    "trec": _trec,
    "banking77": _banking,
    "clinc150": _intents,
    "sms": _sms,
    "agnews": _news,
    "sst2": _reviews,
    "mrpc": _paraphrases,
    "stsb": _similar,
}
DEV_READERS = {
    "clinc150": functools.partial(_intents, part="val"),
    "sst2": functools.partial(_reviews, file="dev.tsv"),
    "stsb": functools.partial(_similar, file="sts-dev.tsv"),
}
PAIRS, SCORED = {"mrpc", "stsb"}, {"stsb"}


if __name__ == "__main__":
    main()
