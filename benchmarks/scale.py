"""Compiles the steps of configs for TPU topologies, without a TPU, and prints a table.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/scale.py \
        [--runs runs/scale] [--only PART]

Needs the extra `tpu`, and before it the text of two configs:
`python benchmarks/wikigold.py <data>/ner/wikigold.conll runs/wikigold-text`. A line that is there
already, in the folder of --runs, is only printed. The heaviest stage of a config is the one with
the most FLOPs. What a config wants from an earlier run is left out: a fine-tuned teacher is a stage
before, and a token store its text. A small batch is raised, so that each of the devices has rows.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

MIB, ALL = 2**20, "v5e:4x4"
TEXT = "corpus={files: ['${TINYBERT_DATA}/mlm/wikipedia_squad_train.txt']}"
OWN = "teacher={path: '${TEACHER}'}"
TASK = [OWN, "finetune={num_epochs: 1, learning_rate: 1.0e-4}"]
VOCABULARY = "tokenizer={path: '${TEACHER}'}"
SST2 = ["task.train=${TINYBERT_DATA}/cls/sst2/train.tsv", "task.text=sentence"]
# BERT-base has no folder here: weights are not read, so its sizes are enough, and a stage before
# that is less work than the one that is compiled.
BASE = [
    "teacher={preset: bert-base}",
    VOCABULARY,
    "pretrain={num_steps: 1, learning_rate: 1.0e-4, max_length: 16}",
]
# (config, settings, topologies)
LINES = [
    ("quickstart", [], [ALL]),
    ("own-text", SST2, [ALL]),
    ("finetune/imdb", [], [ALL]),
    ("finetune/sst2", [OWN], [ALL]),
    ("finetune/english-sst2", [OWN], [ALL]),
    ("pretrain/4l-256d", [VOCABULARY], [ALL]),
    ("pretrain/english-gpu", [TEXT, "pretrain.eval_every=null"], [ALL]),
    ("pretrain/minilm-gpu", [TEXT], [ALL]),
    ("distill/general-3l", ["general.global_batch_size=1024"], [ALL]),
    ("distill/embeddings", [], [ALL]),
    ("distill/multi-label", [], [ALL]),
    ("distill/squad", ["num_seeds=3"], [ALL]),
    ("distill/sst2", [*TASK, "general.global_batch_size=256"], [ALL]),
    ("distill/sst2-english", [*TASK, TEXT], [ALL]),
    ("distill/sst2-family", TASK, [ALL]),
    ("distill/stsb-family", [], [ALL]),
    ("distill/tagging", [], [ALL]),
    ("distill/translation", [], [ALL]),
    *(
        (
            "distill/bert-base",
            [*BASE, f"general.global_batch_size={rows}", f"pretrain.global_batch_size={rows}"],
            [topology],
        )
        for topology, rows in {
            "v5e:4x4": 1024,
            "v5e:16x16": 16384,
            "v6e:16x16": 16384,
            "v5p:8x8x8": 32768,
            "v4:4x4x4": 4096,
        }.items()
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/scale"))
    parser.add_argument("--only", default="", help="lines whose config has this in its name")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(", ".join(versions), flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for config, settings, topologies in LINES:
        for topology in topologies if args.only in config else ():
            file = args.runs / (re.sub(r"\W", "-", f"{config}-{topology}") + ".json")
            if not file.is_file():
                compile_line(config, settings, topology, file)
            print(line(config, json.loads(file.read_text())), flush=True)


def compile_line(config: str, settings: list[str], topology: str, file: Path) -> None:
    command = [sys.executable, "-m", "tinybert_jax", "compile", f"configs/{config}.yaml"]
    command += ["--topology", topology, "--json", "run_dir=" + str(file.with_suffix("")), *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{config} on {topology}: {' '.join(command)} failed")
    file.write_text(done.stdout)


COLUMNS = (
    *("config, stage", "topology", "batch", "memory a device", "fits", "gradients", "reduced"),
    *("other collectives", "FLOPs a device", "padding", "matrix units", "memory", "network"),
    "compiled in",
)


def line(config: str, found: dict) -> str:
    memory, kinds = found["memory"], {}
    for own in found["collectives"]:
        kinds[own["kind"]] = kinds.get(own["kind"], 0) + own["num_bytes"]
    reduced = kinds.pop("all-reduce", 0)
    cells = [
        f"{config}, {found['stage']}",
        found["topology"],
        f"{found['rows']:,} × {found['width']}",
        f"{memory['total'] / MIB:,.0f} of {(memory['limit'] or 0) / MIB:,.0f} MiB",
        "no" if any(own.startswith("memory") for own in found["problems"]) else "yes",
        f"{found['gradient_bytes'] / MIB:.1f} MiB",
        f"{reduced / MIB:.1f} MiB",
        ", ".join(f"{kind} {n:,} B" for kind, n in kinds.items()) or "none",
        f"{sum(found['flops'].values()) / 1e9:,.0f} G",
        f"{1 - found['useful_share']:.0%}",
        *(f"{1e3 * seconds:.2f} ms" for seconds in found["times"].values()),
        f"{found['seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
