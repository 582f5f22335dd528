"""Fine-tuning on SST-2's real lengths: our packed training against transformers' Trainer, one run.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/finetune.py

Real tokens (no padding) per second of the same model, start, optimizer and dropout, 32 examples a
step (packed: on average). Each figure is the median of rounds that the sides run in turn, each in a
process of its own; a ratio says how many times faster than that side our fp32 is.
Trainer pads to 128, or to the longest of a batch of like lengths; fp32, or bf16 autocast.
The grouped sampler goes from long to short in 50 steps: a round of it has to be just as many.
"""

import argparse
import os
import tempfile
from pathlib import Path

import sides

MAX_LENGTH, BATCH_SIZE = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of our side in a round")
    parser.add_argument("--grouped-steps", type=int, default=50, help="of the grouped sides")
    parser.add_argument("--padded-steps", type=int, default=8, help="of the padded sides")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        sides.save_rows(rows, read_rows())
        compared: dict = {
            "ours fp32, packed rows of 64": (ours, (rows, args.steps, None)),
            "ours bfloat16_products, packed rows of 64": (ours, (rows, args.steps, "bfloat16")),
        }
        for dtype in ("fp32", "bf16 autocast"):
            compared |= {
                f"Trainer {dtype}, padded to 128": (padded, (rows, dtype, args.padded_steps)),
                f"Trainer {dtype}, dynamic, length groups": (
                    grouped,
                    (rows, dtype, args.grouped_steps),
                ),
            }
        print(f"all-MiniLM-L6-v2 on SST-2, {BATCH_SIZE} examples a step")
        sides.show(sides.compare(compared, args.rounds), "real tokens")


def read_rows():
    from tinybert_jax.batches.tokenize import tokenize_texts
    from tinybert_jax.data.tables import read_labelled
    from tinybert_jax.huggingface.hub import load_tokenizer

    path = Path(os.environ["TINYBERT_DATA"]) / "cls" / "sst2" / "train.tsv"
    text = read_labelled(str(path), text="sentence", label="label")
    tokenizer = load_tokenizer(os.environ["TEACHER"])
    return tokenize_texts(tokenizer, text, MAX_LENGTH)


def ours(path: Path, num_steps: int, product_dtype: str | None) -> sides.Round:
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax

    from tinybert_jax.batches import loader
    from tinybert_jax.batches.packing import packed_epochs
    from tinybert_jax.huggingface.folder import read_model, start_params
    from tinybert_jax.models.heads import make_classifier
    from tinybert_jax.models.params import unstack_layers
    from tinybert_jax.objectives.supervised import make_supervised

    teacher = os.environ["TEACHER"]
    config, rows = read_model(teacher).config, sides.load_rows(path)
    epochs = packed_epochs(rows.lengths, width=MAX_LENGTH, global_batch_size=BATCH_SIZE, seed=(0,))
    apply, init = make_classifier(config, 2, unroll=True, product_dtype=product_dtype)
    return sides.train_rounds(
        make_supervised(apply),
        unstack_layers(start_params(teacher, init, jax.random.key(0))),
        loader.planned_batches(rows, epochs, pad_token_id=config.pad_token_id),
        num_steps=num_steps,
    )


def padded(path: Path, dtype: str, num_steps: int) -> sides.Round:
    return trainer(path, dtype, num_steps, {"padding": "max_length", "max_length": 128}, "random")


def grouped(path: Path, dtype: str, num_steps: int) -> sides.Round:
    return trainer(path, dtype, num_steps, {"padding": True}, "group_by_length")


def trainer(path: Path, dtype: str, num_steps: int, padding: dict, sampling: str) -> sides.Round:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.environ["TEACHER"])
    rows = sides.load_rows(path)
    ids, ends = rows.ids.tolist(), rows.offsets.tolist()
    examples = [
        {"input_ids": ids[a:b], "attention_mask": [1] * (b - a), "labels": int(label)}
        for a, b, label in zip(ends, ends[1:], rows.labels, strict=False)
    ]
    model = transformers.BertForSequenceClassification.from_pretrained(
        os.environ["TEACHER"], num_labels=2, dtype=torch.float32
    )
    return sides.trainer_rounds(
        model,
        examples,
        transformers.DataCollatorWithPadding(tokenizer, **padding),
        tokenizer,
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        train_sampling_strategy=sampling,
        bf16=dtype != "fp32",
    )


if __name__ == "__main__":
    main()
