"""The loader alone against a torch DataLoader with `DataCollatorForLanguageModeling`, one run.

    python benchmarks/loader.py [--batch-size 1024] [--rows 500000]

Rows of 128 tokens per second, the same pre-tokenised rows in a random order on every side. Each
figure is the median of rounds that the sides run in turn; a ratio says how many times faster than
that side the loader is. The loader has one core for all its threads, and so has the DataLoader
without workers; with workers it has the whole machine.

The loader's batches are not masked: here masking is a part of the compiled train step, on the
device. So the DataLoader is measured with the collator, as it is used, and with the plain collate
function, which does no more than the loader does. Its rows are tensors in memory and bring their
special_tokens_mask along, which is the fastest way to feed the collator.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import sides

WIDTH, VOCAB, PAD, CLS, SEP, MASK = 128, 30522, 0, 101, 102, 103


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(path, args.rows)
        given = (path, args.batch_size)
        print(f"{args.rows:,} rows of {WIDTH} tokens, batches of {args.batch_size}")
        results = sides.compare(
            {
                "loader, one core": (our_loader, given),
                "DataLoader + MLM collator, one core": (torch_loader, (*given, 0, True)),
                "DataLoader + MLM collator, 2 workers": (torch_loader, (*given, 2, True)),
                "DataLoader, default collate, one core": (torch_loader, (*given, 0, False)),
                "DataLoader, default collate, 2 workers": (torch_loader, (*given, 2, False)),
            },
            args.rounds,
        )
        sides.show(results, "rows")


def write_store(folder: Path, num_rows: int) -> None:
    """Random rows as `tinybert data prepare` writes them: a tenth short, a third of two texts."""
    from tinybert_jax.tokens import store

    rng = np.random.default_rng(0)
    ids = rng.integers(1000, VOCAB, (num_rows, WIDTH), np.uint16)
    ids[:, 0] = CLS
    lengths = np.where(rng.random(num_rows) < 0.9, WIDTH, rng.integers(8, WIDTH, num_rows))
    ids[np.arange(num_rows), lengths - 1] = SEP
    ids[np.arange(WIDTH) >= lengths[:, None]] = PAD
    meta = np.zeros(num_rows, store.row_dtype(WIDTH))
    meta["length"], meta["second"], meta["label"] = lengths, lengths, -1
    meta["starts"][:, 0] = 128
    meta["starts"][(lengths == WIDTH) & (rng.random(num_rows) < 1 / 3), WIDTH // 16] = 128
    partial = folder.with_name("partial")
    partial.mkdir()
    dtype = store.ids_dtype(VOCAB)
    writer = store.StoreWriter(partial, WIDTH, dtype, num_rows)
    writer.append(store.Rows(ids, meta), {"rows": num_rows})
    manifest = {"width": WIDTH, "num_rows": num_rows, "num_tokens": int(lengths.sum())}
    manifest |= {"shard_rows": num_rows, "ids_dtype": dtype.str}
    writer.finish(folder, manifest, {})


def our_loader(path: Path, batch_size: int) -> sides.Round:
    os.sched_setaffinity(0, {0})
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    from tinybert_jax.batches import loader
    from tinybert_jax.tokens import store

    batch_at = loader.mixed_batches(
        [store.open_store(path)], [1.0], global_batch_size=batch_size, seed=(0,)
    )
    batches = loader.prefetched(batch_at, start_step=0)
    return lambda: timed(batches, 500_000 // batch_size, batch_size)


def torch_loader(path: Path, batch_size: int, num_workers: int, is_masked: bool) -> sides.Round:
    if not num_workers:
        os.sched_setaffinity(0, {0})
    import torch
    from transformers import BertTokenizer, DataCollatorForLanguageModeling

    torch.set_num_threads(1 if not num_workers else torch.get_num_threads())
    names = ["[PAD]", *(f"w{i}" for i in range(1, VOCAB))]
    for name, number in {"[UNK]": 100, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}.items():
        names[number] = name
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    assert tokenizer.mask_token_id == MASK
    rows = np.fromfile(path / "shard-00000.ids", np.uint16).astype(np.int64)
    ids = torch.from_numpy(rows.reshape(-1, WIDTH))
    data = torch.utils.data.DataLoader(
        TensorRows(ids),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        collate_fn=DataCollatorForLanguageModeling(tokenizer) if is_masked else None,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )

    def batches():
        while True:
            yield from data

    stream = batches()
    return lambda: timed(stream, max(40, 20_000 // batch_size), batch_size)


class TensorRows:
    """What run_mlm's dataset holds for a row, as tensors."""

    def __init__(self, ids):
        self.ids = ids
        self.special = (ids == PAD) | (ids == CLS) | (ids == SEP)
        self.zeros = ids[0] * 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {
            "input_ids": self.ids[index],
            "attention_mask": (self.ids[index] != PAD).long(),
            "token_type_ids": self.zeros,
            "special_tokens_mask": self.special[index],
        }


def timed(batches, num_batches: int, batch_size: int) -> tuple[float, float]:
    begin = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size, time.perf_counter() - begin


if __name__ == "__main__":
    main()
