"""Updates a model of clinc150 from 100 intents to 150, and counts what breaks.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/update.py \
        [--rows 20] [--seed 1] [--runs runs/update] [key.path=value …]

The old model is the teacher, fine-tuned on `--rows` texts of each of 100 intents. It is updated
with as many texts of 50 further intents in three ways: by `tinybert update` as it is, which trains
three seeds; by plain continued training on the same rows, old and new (one seed, no old model as
teacher, no interpolation); by plain training on the new rows and ten old ones. All are compared
with the old model on the 3,000 texts of clinc150's validation set, which nothing was trained on.
Seed 0 chose how closely the outputs of new labels are fitted, `old_weight`, the three seeds and the
loss among the criteria: take other seeds. Stages that are done are not done again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

NUM_OLD = 100
PLAIN = ["num_seeds=1", "update.old_weight=0", "update.interpolations=[1.0]"]
ARMS = {
    "tinybert update": [],
    "plain, old and new rows": PLAIN,
    "plain, new rows and ten old": [*PLAIN, "task.max_old_rows=10"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="of all updates")
    parser.add_argument("--rows", type=int, default=20, help="texts of an intent; default: 20")
    parser.add_argument("--seed", type=int, default=1, help="of the intents and of all runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/update"))
    args = parser.parse_intermixed_args()
    folder = args.runs / f"{args.rows}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, args.rows, args.seed)
    old = train_old(folder, args.seed)
    print("| way | old rows broken | of them fixed | new rows right |\n|---|---|---|---|")
    for name, settings in ARMS.items():
        model = update(folder, name, old, [*settings, *args.settings, f"seed={args.seed}"])
        kept = compare(old, model, folder / "val-old.tsv", folder / "compared.json")
        right = evaluate(model, folder / "val-new.tsv")
        broken = f"{kept['pairs']['broken']} ({kept['broken_share']:.2%})"
        print(f"| {name} | {broken} | {kept['pairs']['fixed']} | {right:.2%} |", flush=True)


def write_rows(folder: Path, num_rows: int, seed: int) -> None:
    """old.tsv and new.tsv to train on, val-old.tsv and val-new.tsv."""
    file = Path(os.environ["TINYBERT_DATA"]) / "cls" / "clinc150" / "train_val.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    intents = sorted({label for _, label in data["train"]})
    random.Random(seed).shuffle(intents)
    sides = {"old": set(intents[:NUM_OLD]), "new": set(intents[NUM_OLD:])}
    for name, own in sides.items():
        seen = dict.fromkeys(own, 0)
        train = []
        for text, label in data["train"]:
            if label in own and seen[label] < num_rows:
                seen[label] += 1
                train.append((text, label))
        write(folder / f"{name}.tsv", train)
        write(folder / f"val-{name}.tsv", [row for row in data["val"] if row[1] in own])


def write(file: Path, rows: list) -> None:
    lines = (f"{' '.join(text.split())}\t{label}\n" for text, label in rows)
    file.write_text("text\tlabel\n" + "".join(lines), encoding="utf-8")


def train_old(folder: Path, seed: int) -> Path:
    """The folder of the old model."""
    run_dir = folder / "old"
    stages = ["intermediate=null", "prediction=null", "baseline=null"]
    options = ["--data", str(folder / "old.tsv"), "--text", "text", "--label", "label"]
    options += ["--task", "classification", "--teacher", os.environ["TEACHER"]]
    if not (run_dir / "hf").is_dir():
        tinybert("run", *options, *stages, f"seed={seed}", f"run_dir={run_dir}")
    return run_dir / "hf"


def update(folder: Path, name: str, old: Path, settings: list[str]) -> Path:
    """The folder of an updated model, also of one that the gate refuses (status 3)."""
    run_dir = folder / name.replace(",", "").replace(" ", "-")
    rows = [str(folder / "new.tsv"), "--old", str(folder / "old.tsv")]
    columns = ["--text", "text", "--label", "label"]
    tinybert("update", str(old), *rows, *columns, *settings, f"run_dir={run_dir}", allowed=3)
    return run_dir / "models" / "update"


def compare(old: Path, new: Path, data: Path, output: Path) -> dict:
    tinybert("compare", str(old), str(new), str(data), "-o", str(output))
    return json.loads(output.read_text(encoding="utf-8"))


def evaluate(model: Path, data: Path) -> float:
    printed = tinybert("evaluate", str(model), str(data), stdout=subprocess.PIPE)
    return json.loads(printed)["accuracy"]


def tinybert(*words: str, allowed: int = 0, stdout: int | None = None) -> str:
    command = [sys.executable, "-m", "tinybert_jax", *words]
    done = subprocess.run(command, text=True, stdout=stdout or sys.stderr)
    if done.returncode not in (0, allowed):
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
