"""Decoding beside `EncoderDecoderModel.generate` of transformers: same weights, same tokens.

    python benchmarks/decoding.py [--layers 4 --width 256 --vocab 8000 --tokens 32]

Random weights, which end no target: every row has the same number of steps on both sides. Each
line: milliseconds of a call (best of the rounds, the sides in turn), tokens a second, the memory
that a process of its own takes beyond the loaded model (its peak, compiling included, and in later
calls), and whether the tokens are equal. Needs PyTorch.
"""

import argparse
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from tinybert_jax import TinyBertForConditionalGeneration

SOURCE = 16
CASES = {"1 row, greedy": (1, 1), "64 rows, greedy": (64, 1), "64 rows, 4 beams": (64, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each row")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    theirs = make_model(args.layers, args.width, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = TinyBertForConditionalGeneration.from_pretrained(Path(folder))
    for name, case in CASES.items():
        sides = {
            "transformers": call_of(theirs, case, args.tokens, args.vocab),
            "here": call_of(ours, case, args.tokens, args.vocab),
        }
        tokens = {side: run() for side, run in sides.items()}  # compiles
        best = dict.fromkeys(sides, np.inf)
        for _ in range(args.rounds):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                best[side] = min(best[side], time.perf_counter() - start)
        for side, seconds in best.items():
            rate = case[0] * args.tokens / seconds
            first, later = memory_of(side, case, args)
            print(
                f"{name:<17} {side:<13} {1000 * seconds:8.1f} ms {rate:10,.0f} tokens/s "
                f"{first:6,.0f} MB at most, {later:6,.0f} MB in later calls"
            )
        share = (tokens["here"] == tokens["transformers"]).all(axis=1).mean()
        ratio = best["transformers"] / best["here"]
        print(f"{name:<17} {ratio:.2f} times as fast, {share:.0%} of the rows equal", flush=True)


def call_of(model, case: tuple[int, int], num_tokens: int, vocab_size: int):
    """A call of `generate` of either side without arguments."""
    num_rows, num_beams = case
    ids = np.random.default_rng(0).integers(5, vocab_size, (num_rows, SOURCE))
    options = {"max_new_tokens": num_tokens, "num_beams": num_beams}
    if isinstance(model, EncoderDecoderModel):
        return lambda: model.generate(torch.tensor(ids), do_sample=False, **options).numpy()
    return lambda: model.generate(ids, **options)


def memory_of(side: str, case: tuple[int, int], args: argparse.Namespace) -> list[float]:
    """MB beyond the loaded model of a new process: (at most, in calls after the first two)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (side, case, args))


def _memory(side: str, case: tuple[int, int], args: argparse.Namespace) -> list[float]:
    model = make_model(args.layers, args.width, args.vocab)
    if side == "here":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = TinyBertForConditionalGeneration.from_pretrained(Path(folder))
    call = call_of(model, case, args.tokens, args.vocab)
    before, found = _resident(), []
    for num_calls in (2, 3):
        most, done = [_resident()], threading.Event()

        def watch(most=most, done=done):
            while not done.wait(0.002):
                most.append(_resident())

        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(num_calls):
            call()
        done.set()
        thread.join()
        found.append((max(most) - before) / 1e6)
    return found


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def make_model(num_layers: int, width: int, vocab_size: int) -> EncoderDecoderModel:
    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=128,
    )
    both = EncoderDecoderConfig.from_encoder_decoder_configs(sizes, BertConfig(**sizes.to_dict()))
    both.update({"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0})
    model = EncoderDecoderModel(config=both).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that tokens depend on the source
        model.decoder.cls.predictions.bias[3] = -1e4
    model.generation_config.update(decoder_start_token_id=2, eos_token_id=3, pad_token_id=0)
    return model


if __name__ == "__main__":
    main()
