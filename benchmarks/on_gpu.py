"""Layer distillation and masked-LM pretraining in bf16 on one GPU: ours against PyTorch.

    python benchmarks/on_gpu.py --out on_gpu.json

`distill`: TinyBERT's general stage (attention scores, hidden states, embeddings), BERT-base into
tinybert-4l-312d; `mlm`: BERT's masked LM, 15 % masked. Whole steps: forward with dropout, gradient,
clipping, AdamW. All weights and tokens are random, what a step costs does not depend on them; all
rows are full, so that slots are tokens. Sides run one after the other, each in a process of its
own: a warm-up round, then the median over the rounds. `--together 5`: that many are compiled and
warmed up at one time, to save some of it, and then measured in turn; none is measured before all of
them are ready. The share of the card's nominal peak counts
the same FLOPs for all sides of a measure: those of the model, no recomputation, and of the
masked-LM head those at the positions that ours picks and predicts.

PyTorch is transformers' BERT under torch.compile, bf16 autocast and fused AdamW, a bf16 teacher,
its batches on the GPU and masked beforehand, and no attention mask, since no row needs one; ours
has its loader, its mask and its corruption inside the clock. Distillation there has the losses of
the released TinyBERT code, mean squared errors of raw score maps, so that its attention has to make
the maps: no fused kernel (SDPA) returns them. Pretraining has SDPA. `--gathered` adds a side whose
masked-LM head runs at the masked tokens alone, which transformers leaves to its user.
`--attention auto,xla,cudnn` runs our sides once for each; by itself cuDNN's attention cannot drop
out, so that its side trains without dropout of attention, and says so.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sides
from on_gpu_torch import torch_distill, torch_mlm
from on_gpu_work import (
    MASK_RATE,
    MASK_TOKEN_ID,
    NUM_BATCHES,
    SPECIAL_TOKEN_IDS,
    Ready,
    Settings,
    Work,
    flops_per_slot,
    make_measures,
    token_ids,
)


class Side(NamedTuple):
    """One line of the table; `make_round` is called in the side's own process."""

    measure: str
    name: str
    make_round: Callable[..., "Ready"]
    arguments: tuple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON, written anew after every side")
    parser.add_argument("--sides", default="", help="only those with this in 'measure: side'")
    parser.add_argument("--attention", default="auto", help="comma list: our sides once for each")
    parser.add_argument("--gathered", action="store_true", help="a further PyTorch side of mlm")
    parser.add_argument("--chunk-size", type=int, default=512, help="loss_chunk_size of our mlm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--unrolled", action="store_true", help="our layers, instead of a loop")
    parser.add_argument("--together", type=int, default=1, help="sides that are set up at one time")
    parser.add_argument("--limit", type=float, default=150, help="seconds until a side is ready")
    parser.add_argument("--trace", type=Path, help="folder: a profile of a round of ours, untimed")
    parser.add_argument("--quick", action="store_true", help="1 round of 3 steps")
    parser.add_argument("--tiny", action="store_true", help="tiny models on any device: a trial")
    args = parser.parse_args()
    # Else the first of several processes on one card takes three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    num_steps, num_rounds = (3, 1) if args.quick else (args.steps, args.rounds)
    settings = Settings(num_steps, num_rounds, args.chunk_size, args.unrolled, args.tiny)
    measures = make_measures(args.tiny)
    made = make_sides(measures, settings, args.attention.split(","), args.gathered)
    chosen = [side for side in made if args.sides in f"{side.measure}: {side.name}"]
    lines: list[dict[str, Any]] = []
    for side, figures in in_turn(chosen, num_rounds, args.together, args.limit, args.trace):
        line = {"measure": side.measure, "side": side.name} | figures
        if "rate" in line:
            line |= priced(line, measures.get(side.measure), args.chunk_size)
        lines.append(line)
        print(shown(line), flush=True)
        if args.out:
            args.out.write_text(json.dumps(lines, indent=1) + "\n")
    print("\nall sides; ratio: ours / PyTorch, the fastest of its sides that ran")
    for line in lines:
        print(shown(line, ratio(line, lines)))


def make_sides(
    measures: dict[str, Work], settings: Settings, attentions: list[str], gathered: bool
) -> list[Side]:
    """Short ones first: a run that is cut off has most of its lines."""
    made = [Side("gemm", "XLA", gemm, (512 if settings.tiny else 8192, settings.tiny))]
    for name, work in measures.items():
        for attention in attentions:
            label = "ours" if attention == "auto" else f"ours, {attention}"
            label += ", no attention dropout" if attention == "cudnn" else ""
            made.append(Side(name, label, ours, (work, settings, attention)))
        if work.kind == "distill":
            made.append(Side(name, "PyTorch", torch_distill, (work, settings)))
            continue
        made.append(Side(name, "PyTorch", torch_mlm, (work, settings, False)))
        if gathered:
            made.append(Side(name, "PyTorch, gathered", torch_mlm, (work, settings, True)))
    return made


def in_turn(
    chosen: list[Side], num_rounds: int, num_together: int, limit: float, trace: Path | None
) -> Iterator[tuple[Side, dict[str, Any]]]:
    """Each side's figures, or its error in one line; its process has ended when they come."""
    context = multiprocessing.get_context("spawn")
    for first in range(0, len(chosen), num_together):
        group, deadline = [], time.monotonic() + limit
        for side in chosen[first : first + num_together]:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, side, num_rounds, trace))
            process.start()
            theirs.close()
            group.append((side, pipe, process))
        ready = [_told(pipe, process, deadline - time.monotonic()) for _, pipe, process in group]
        for (side, pipe, process), figures in zip(group, ready, strict=True):
            if "error" not in figures:
                pipe.send("go")
                figures |= _told(pipe, process, limit)
            if process.is_alive():
                process.kill()
            process.join()
            yield side, figures


def _told(pipe, process, seconds: float) -> dict[str, Any]:
    try:
        if pipe.poll(max(seconds, 0)):
            return pipe.recv()
        process.kill()
        return {"error": f"no answer within {max(seconds, 0):.0f} s"}
    except EOFError:
        process.join(timeout=10)
        return {"error": f"its process ended with code {process.exitcode}"}


def _serve(pipe, side: Side, num_rounds: int, trace: Path | None) -> None:
    begin = time.perf_counter()
    try:
        ready = side.make_round(*side.arguments)
        ready.run()
        pipe.send({"setup_s": time.perf_counter() - begin})
        pipe.recv()
        ready.run()  # the card has been with others
        rounds = [ready.run() for _ in range(num_rounds)]
        rates = [units / seconds for units, seconds in rounds]
        if trace and side.name.startswith("ours"):
            _trace(ready, trace / re.sub(r"\W+", "-", f"{side.measure} {side.name}"))
        device, peak_bytes = ready.device()
        figures = {
            "rate": statistics.median(rates),
            "rates": rates,
            "round_s": statistics.median(seconds for _, seconds in rounds),
            "device": device,
            "peak_bytes": peak_bytes,
            "note": ready.note,
        }
    except Exception as error:  # whatever it is, the other sides go on
        first_line = (str(error).strip() or "no message").split("\n")[0]
        trace = traceback.format_exc()[-4000:]
        figures = {"error": f"{type(error).__name__}: {first_line}"[:300], "traceback": trace}
    pipe.send(figures)
    pipe.close()


def _trace(ready: Ready, folder: Path) -> None:
    import jax

    with jax.profiler.trace(folder):
        ready.run()


def priced(line: dict[str, Any], work: Work | None, chunk_size: int) -> dict[str, Any]:
    """What the rate is in FLOP/s and of the card's nominal bf16 peak; `gemm` has no work."""
    from tinybert_jax.performance.device_peaks import peak_flops

    flops = flops_per_slot(work, chunk_size) if work else 1
    peak = peak_flops(line["device"], "bfloat16")
    achieved = line["rate"] * flops
    return {
        "flops_per_slot": flops,
        "flops_per_second": achieved,
        "share_of_peak": achieved / peak if peak else None,
    }


def ratio(line: dict[str, Any], lines: list[dict[str, Any]]) -> float | None:
    """How many times the fastest PyTorch side of its measure one of ours is."""
    peers = [
        other["rate"]
        for other in lines
        if other["measure"] == line["measure"]
        and other["side"].startswith("PyTorch")
        and "rate" in other
    ]
    if not peers or "rate" not in line or not line["side"].startswith("ours"):
        return None
    return line["rate"] / max(peers)


def shown(line: dict[str, Any], times: float | None = None) -> str:
    name = f"{line['measure']:<21}{line['side']:<33}"
    if "error" in line:
        return f"  {name} FAILED {line['error']}"
    tflops = f"{line['flops_per_second'] / 1e12:6.1f} TFLOP/s"
    share, held = line["share_of_peak"], line["peak_bytes"]
    parts = [
        f"{'':>20}" if line["measure"] == "gemm" else f"{line['rate']:>12,.0f} slots/s",
        tflops,
        f"{share:6.1%} of peak" if share else "peak unknown",
        f"{held / 2**30:5.1f} GiB" if held else "    - GiB",
        f"setup {line['setup_s']:4.0f} s",
        *([f"ratio {times:.2f}"] if times else []),
        *([line["note"]] if line["note"] else []),
    ]
    return f"  {name} " + "  ".join(parts)


def gemm(size: int, tiny: bool) -> Ready:
    """One bf16 product of two square matrices, several in flight."""
    import jax
    import jax.numpy as jnp

    device = _jax_device(tiny)
    left, right = (
        jax.random.normal(key, (size, size), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    multiply = jax.jit(jnp.matmul)
    num_products = 10
    jax.block_until_ready(multiply(left, right))

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        for _ in range(num_products):
            product = multiply(left, right)
        product.block_until_ready()  # they run in order
        return 2 * size**3 * num_products, time.perf_counter() - begin

    return Ready(run, device, f"{size}^3 on {device()[0]}")


def ours(work: Work, settings: Settings, attention: str) -> Ready:
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax
    import jax.numpy as jnp

    from tinybert_jax.models.params import unstack_layers
    from tinybert_jax.settings.sizes import ModelConfig

    device = _jax_device(settings.tiny)
    options: dict[str, Any] = {"unroll": settings.unrolled, "dtype": jnp.bfloat16}
    if attention != "auto":
        options["attention"] = attention
    no_dropout = {"attention_probs_dropout_prob": 0.0} if attention == "cudnn" else {}
    student = ModelConfig(**work.student | no_dropout)  # cuDNN's attention has none
    keys = jax.random.split(jax.random.key(0), 3)
    frozen: Any = ()
    if work.teacher:
        from tinybert_jax.config.distillation import DistillSection
        from tinybert_jax.models.heads import make_encoder
        from tinybert_jax.models.params import frozen_params
        from tinybert_jax.objectives.alignment import init_projection
        from tinybert_jax.objectives.distillation import Role, make_distill
        from tinybert_jax.terms.table import reads_of

        terms = DistillSection().terms("general")
        teacher = ModelConfig(**work.teacher)
        apply, init = make_encoder(student, **options)
        teacher_apply, teacher_init = make_encoder(teacher, **options)
        frozen = frozen_params(
            jax.jit(teacher_init)(keys[0]),
            dtype=jnp.bfloat16,
            unroll=settings.unrolled,
        )
        objective = make_distill(
            Role(apply, reads_of(terms), student.num_hidden_layers),
            Role(teacher_apply, reads_of(terms, of_teacher=True), teacher.num_hidden_layers),
            terms,
        )
        projection = init_projection(keys[1], student.hidden_size, teacher.hidden_size, 1)
        params: Any = {"student": jax.jit(init)(keys[2]), "projection": projection}
    else:
        from tinybert_jax.models.heads import make_masked_lm
        from tinybert_jax.objectives.masked_lm import make_mlm

        apply, init = make_masked_lm(student, **options)
        objective = make_mlm(
            apply,
            mask_rate=MASK_RATE,
            mask_token_id=MASK_TOKEN_ID,
            special_token_ids=SPECIAL_TOKEN_IDS,
            vocab_size=student.vocab_size,
            max_chunk_size=settings.chunk_size,
        )
        params = jax.jit(init)(keys[2])
    batches = [_batch(ids) for ids in token_ids(work)]
    run = sides.train_rounds(
        objective,
        unstack_layers(params) if settings.unrolled else params,
        lambda step: batches[step % NUM_BATCHES],
        num_steps=settings.num_steps,
        frozen=frozen,
    )
    return Ready(run, device)


def _jax_device(tiny: bool) -> Callable[[], tuple[str, int | None]]:
    import jax

    device = jax.devices()[0]
    if not tiny and device.platform != "gpu":
        raise ValueError(f"expected a GPU, got {device.platform}; give --tiny for a trial without")

    def told() -> tuple[str, int | None]:
        return device.device_kind, (device.memory_stats() or {}).get("peak_bytes_in_use")

    return told


def _batch(ids: np.ndarray):
    """Full rows of one text without a label."""
    from tinybert_jax.batches.batch import Plan, TokenRows, make_batch

    num_rows, width = ids.shape
    rows = TokenRows(
        ids=ids.ravel(),
        offsets=np.arange(num_rows + 1) * width,
        second=np.full(num_rows, width, np.int32),
        labels=None,
        num_truncated=0,
    )
    return make_batch(rows, Plan(np.arange(num_rows), width), pad_token_id=0)


if __name__ == "__main__":
    main()
