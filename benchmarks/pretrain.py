"""Masked-LM pretraining of tinybert-4l-312d at T=128: our training against Trainer, one run.

    TEACHER=<folder with a tokenizer> TINYBERT_DATA=<data> python benchmarks/pretrain.py

Tokens per second of the same model and optimizer on the same rows of text, all full: 32 rows a
step, 15 % masked as in BERT. Each figure is the median of rounds that the sides run in turn, each
in a process of its own; a ratio says how many times faster than that side our fp32 is.
Trainer masks in `DataCollatorForLanguageModeling`; fp32, or bf16 autocast.
"""

import argparse
import os
import tempfile
from pathlib import Path

import sides

PRESET, WIDTH, MASK_RATE = "tinybert-4l-312d", 128, 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of every side in a round")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    print(f"{PRESET}, {args.batch_size} rows of {WIDTH} tokens a step")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        sides.save_rows(rows, read_rows())
        given = (rows, args.steps, args.batch_size)
        results = sides.compare(
            {
                "ours fp32": (ours, (*given, None)),
                "ours bfloat16_products": (ours, (*given, "bfloat16")),
                "Trainer fp32": (trainer, (*given, False)),
                "Trainer bf16 autocast": (trainer, (*given, True)),
            },
            args.rounds,
        )
    sides.show(results, "tokens")


def read_rows():
    """The full rows of a part of the shared corpus."""
    import numpy as np

    from tinybert_jax.batches.batch import TokenRows
    from tinybert_jax.batches.tokenize import tokenize_corpus
    from tinybert_jax.data.corpus import read_corpus
    from tinybert_jax.huggingface.hub import load_tokenizer

    path = Path(os.environ["TINYBERT_DATA"]) / "mlm" / "wikipedia_squad_train.txt"
    documents = read_corpus((str(path),))[:2000]
    tokenizer = load_tokenizer(os.environ["TEACHER"])
    rows = tokenize_corpus(tokenizer, documents, WIDTH)
    is_full = rows.lengths == WIDTH
    num_full = int(is_full.sum())
    return TokenRows(
        ids=rows.ids[np.repeat(is_full, rows.lengths)],
        offsets=np.arange(num_full + 1, dtype=np.int64) * WIDTH,
        second=np.full(num_full, WIDTH, np.int32),
        labels=None,
        num_truncated=0,
    )


def sizes(tokenizer) -> dict:
    from tinybert_jax.settings.sizes import PRESETS

    return PRESETS[PRESET] | {"vocab_size": len(tokenizer)}


def ours(path: Path, num_steps: int, batch_size: int, product_dtype: str | None) -> sides.Round:
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax

    from tinybert_jax.batches import loader
    from tinybert_jax.batches.bucketing import bucketed_epochs
    from tinybert_jax.huggingface.hub import load_tokenizer
    from tinybert_jax.models.heads import make_masked_lm
    from tinybert_jax.models.params import unstack_layers
    from tinybert_jax.objectives.masked_lm import make_mlm
    from tinybert_jax.settings.sizes import ModelConfig

    tokenizer, rows = load_tokenizer(os.environ["TEACHER"]), sides.load_rows(path)
    epochs = bucketed_epochs(
        rows.lengths, buckets=(WIDTH,), global_batch_size=batch_size, seed=(0,)
    )
    apply, init = make_masked_lm(
        ModelConfig(**sizes(tokenizer)), unroll=True, product_dtype=product_dtype
    )
    objective = make_mlm(
        apply,
        mask_rate=MASK_RATE,
        mask_token_id=tokenizer.mask_token_id,
        special_token_ids=tuple(tokenizer.all_special_ids),
        vocab_size=len(tokenizer),
    )
    return sides.train_rounds(
        objective,
        unstack_layers(init(jax.random.key(0))),
        loader.planned_batches(rows, epochs, pad_token_id=tokenizer.pad_token_id),
        num_steps=num_steps,
    )


def trainer(path: Path, num_steps: int, batch_size: int, is_bf16: bool) -> sides.Round:
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
    )

    tokenizer, rows = AutoTokenizer.from_pretrained(os.environ["TEACHER"]), sides.load_rows(path)
    special = set(tokenizer.all_special_ids)
    examples = [
        {"input_ids": ids, "special_tokens_mask": [int(i in special) for i in ids]}
        for ids in rows.ids.reshape(-1, WIDTH).tolist()
    ]
    return sides.trainer_rounds(
        BertForMaskedLM(BertConfig(**sizes(tokenizer))),
        examples,
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE),
        tokenizer,
        num_steps=num_steps,
        batch_size=batch_size,
        remove_unused_columns=False,
        bf16=is_bf16,
    )


if __name__ == "__main__":
    main()
