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
import itertools
import json
import math
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sides

MASK_RATE, MASK_TOKEN_ID, SPECIAL_TOKEN_IDS = 0.15, 103, (0, 101, 102, 103)
FIRST_WORD_ID, NUM_BATCHES = 1000, 4


class Work(NamedTuple):
    """What one measure trains, and on what."""

    kind: str  # distill or mlm
    student: dict[str, int]  # sizes under BertConfig's names; of mlm the only model
    teacher: dict[str, int] | None
    width: int
    batch_size: int


class Settings(NamedTuple):
    """How every side runs it."""

    num_steps: int
    num_rounds: int
    chunk_size: int  # predictions whose logits our masked LM makes at one time
    unrolled: bool  # our layers one by one, not as a loop: compiles for minutes
    tiny: bool  # any device, no torch.compile


class Side(NamedTuple):
    """One line of the table; `make_round` is called in the side's own process."""

    measure: str
    name: str
    make_round: Callable[..., "Ready"]
    arguments: tuple


class Ready(NamedTuple):
    """A side that is set up: what to time, and what to ask it afterwards."""

    run: sides.Round
    device: Callable[[], tuple[str, int | None]]  # its name, the most bytes that it ever held
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON, written anew after every side")
    parser.add_argument("--sides", default="", help="only those with this in 'measure: side'")
    parser.add_argument("--attention", default="auto", help="comma list: our sides once for each")
    parser.add_argument("--gathered", action="store_true", help="a further PyTorch side of mlm")
    parser.add_argument("--chunk-size", type=int, default=256, help="loss_chunk_size of our mlm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--unrolled", action="store_true", help="our layers, instead of a loop")
    parser.add_argument("--together", type=int, default=1, help="sides that are set up at one time")
    parser.add_argument("--limit", type=float, default=150, help="seconds until a side is ready")
    parser.add_argument("--quick", action="store_true", help="1 round of 3 steps")
    parser.add_argument("--tiny", action="store_true", help="tiny models on any device: a trial")
    args = parser.parse_args()
    num_steps, num_rounds = (3, 1) if args.quick else (args.steps, args.rounds)
    settings = Settings(num_steps, num_rounds, args.chunk_size, args.unrolled, args.tiny)
    measures = make_measures(args.tiny)
    made = make_sides(measures, settings, args.attention.split(","), args.gathered)
    chosen = [side for side in made if args.sides in f"{side.measure}: {side.name}"]
    lines: list[dict[str, Any]] = []
    for side, figures in in_turn(chosen, num_rounds, args.together, args.limit):
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


def make_measures(tiny: bool) -> dict[str, Work]:
    from tinybert_jax.presets import PRESETS

    student, base = PRESETS["tinybert-4l-312d"], PRESETS["bert-base"]
    widths, rows = (128, 512), (256, 64)
    if tiny:
        student = _tiny_sizes(num_hidden_layers=2, hidden_size=24)
        base = _tiny_sizes(num_hidden_layers=4, hidden_size=48)
        widths, rows = (16, 32), (4, 4)
    return {
        f"distill T={widths[0]}": Work("distill", student, base, widths[0], rows[0]),
        "mlm tinybert-4l-312d": Work("mlm", student, None, widths[0], rows[0]),
        f"distill T={widths[1]}": Work("distill", student, base, widths[1], rows[1]),
        "mlm bert-base": Work("mlm", base, None, widths[0], rows[0]),
    }


def _tiny_sizes(**sizes: int) -> dict[str, int]:
    return sizes | {"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 1200}


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
    chosen: list[Side], num_rounds: int, num_together: int, limit: float
) -> Iterator[tuple[Side, dict[str, Any]]]:
    """Each side's figures, or its error in one line; its process has ended when they come."""
    context = multiprocessing.get_context("spawn")
    for first in range(0, len(chosen), num_together):
        group, deadline = [], time.monotonic() + limit
        for side in chosen[first : first + num_together]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, side, num_rounds))
            process.start()
            theirs.close()
            group.append((side, ours, process))
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


def _serve(pipe, side: Side, num_rounds: int) -> None:
    begin = time.perf_counter()
    try:
        ready = side.make_round(*side.arguments)
        ready.run()
        pipe.send({"setup_s": time.perf_counter() - begin})
        pipe.recv()
        ready.run()  # the card has been with others
        rounds = [ready.run() for _ in range(num_rounds)]
        rates = [units / seconds for units, seconds in rounds]
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


def priced(line: dict[str, Any], work: Work | None, chunk_size: int) -> dict[str, Any]:
    """What the rate is in FLOP/s and of the card's nominal bf16 peak; `gemm` has no work."""
    from tinybert_jax import cost

    flops = flops_per_slot(work, chunk_size) if work else 1
    peak = cost.peak_flops(line["device"], "bfloat16")
    achieved = line["rate"] * flops
    return {
        "flops_per_slot": flops,
        "flops_per_second": achieved,
        "share_of_peak": achieved / peak if peak else None,
    }


def flops_per_slot(work: Work, chunk_size: int) -> float:
    """As `plan` counts a stage: the masked-LM head at its slots and, in whole chunks, its words."""
    from tinybert_jax import cost, masking
    from tinybert_jax.sections import ModelConfig

    student = ModelConfig(**work.student)
    if work.teacher:
        teacher = ModelConfig(**work.teacher)
        return cost.training_flops_per_token(
            [student], work.width, projection_dim=teacher.hidden_size, teacher=teacher
        )
    num_slots = work.batch_size * work.width
    num_picked = work.batch_size * masking.num_slots(MASK_RATE, work.width)
    chunk_size = min(chunk_size, num_picked)
    num_predicted = chunk_size * math.ceil(MASK_RATE * num_slots / chunk_size)
    head = cost.masked_lm_flops(student, num_picked, num_predicted) / num_slots
    return 3 * (cost.forward_flops_per_token(student, work.width) + head)


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


def shown(line: dict[str, Any], ratio: float | None = None) -> str:
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
        *([f"ratio {ratio:.2f}"] if ratio else []),
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
    from tinybert_jax import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax
    import jax.numpy as jnp

    from tinybert_jax.sections import ModelConfig

    device = _jax_device(settings.tiny)
    options: dict[str, Any] = {"unroll": settings.unrolled, "dtype": jnp.bfloat16}
    if attention != "auto":
        options["attention"] = attention
    no_dropout = {"attention_probs_dropout_prob": 0.0} if attention == "cudnn" else {}
    student = ModelConfig(**work.student | no_dropout)  # cuDNN's attention has none
    keys = jax.random.split(jax.random.key(0), 3)
    frozen: Any = ()
    if work.teacher:
        from tinybert_jax.distill import init_projection
        from tinybert_jax.distill_objective import Role, make_distill
        from tinybert_jax.model.heads import make_encoder
        from tinybert_jax.objective_sections import DistillSection

        teacher = ModelConfig(**work.teacher)
        apply, init = make_encoder(student, **options)
        teacher_apply, teacher_init = make_encoder(teacher, **options)
        frozen = jax.jit(teacher_init)(keys[0])
        objective = make_distill(
            Role(apply, "encoder", student.num_hidden_layers),
            Role(teacher_apply, "encoder", teacher.num_hidden_layers),
            DistillSection().terms("general"),
        )
        projection = init_projection(keys[1], student.hidden_size, teacher.hidden_size, 1)
        params = {"student": jax.jit(init)(keys[2]), "projection": projection}
    else:
        from tinybert_jax.model.heads import make_masked_lm
        from tinybert_jax.objectives import make_mlm

        apply, init = make_masked_lm(student, **options)
        objective = make_mlm(
            apply,
            mask_rate=MASK_RATE,
            mask_token_id=MASK_TOKEN_ID,
            special_token_ids=SPECIAL_TOKEN_IDS,
            vocab_size=student.vocab_size,
            chunk_size=settings.chunk_size,
        )
        params = jax.jit(init)(keys[2])
    batches = [_batch(ids) for ids in token_ids(work)]
    run = sides.train_rounds(
        objective,
        params,
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


def token_ids(work: Work) -> list[np.ndarray]:
    """int32 [batch, seq], `NUM_BATCHES` of them; the same for all sides."""
    generator = np.random.default_rng(0)
    shape, end = (work.batch_size, work.width), work.student.get("vocab_size", 30522)
    return [
        generator.integers(FIRST_WORD_ID, end, shape, dtype=np.int32) for _ in range(NUM_BATCHES)
    ]


def _batch(ids: np.ndarray):
    from tinybert_jax.data.pipeline import Batch

    return Batch(
        input_ids=ids,
        attention_mask=np.ones(ids.shape, bool),
        token_type_ids=np.zeros(ids.shape, np.int32),
        labels=np.full(len(ids), -1, np.int32),
        weights=np.ones(len(ids), np.float32),
    )


def torch_distill(work: Work, settings: Settings) -> Ready:
    import torch

    device = _torch_device(settings.tiny)
    teacher = _torch_model("AutoModel", work.teacher, device, "scores")
    student = _torch_model("AutoModel", work.student, device, "scores")
    fit = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size, device=device)
    teacher.to(torch.bfloat16).eval().requires_grad_(False)
    student.train()
    given = [torch.from_numpy(ids).long().to(device) for ids in token_ids(work)]
    teach, learn = make_torch_losses(student, teacher, fit, is_bf16=True)
    trained = [*student.parameters(), *fit.parameters()]

    def make_loss(compiled: Callable) -> Callable:
        compiled_teach, compiled_learn = compiled(teach), compiled(learn)

        def loss(ids):
            with torch.no_grad():
                targets = compiled_teach(ids)
            return compiled_learn(ids, targets)

        return loss

    return _torch_rounds(make_loss, trained, [(ids,) for ids in given], work, settings, device)


def make_torch_losses(student, teacher, fit, *, is_bf16: bool) -> tuple[Callable, Callable]:
    """teach(ids) -> (hidden states, score maps) of the mapped layers; learn(ids, those) -> loss.

    The bf16 teacher needs no autocast.
    """
    import torch

    mse = torch.nn.functional.mse_loss
    stride = teacher.config.num_hidden_layers // student.config.num_hidden_layers
    device_type = fit.weight.device.type

    def taps(model, ids):
        scores: list = []  # the attention of each layer appends its own
        hidden = [model.embeddings(input_ids=ids)]
        for layer in model.encoder.layer:
            hidden.append(layer(hidden[-1], scores=scores))
        return hidden, scores

    def teach(ids):
        hidden, scores = taps(teacher, ids)
        return hidden[::stride], scores[stride - 1 :: stride]

    def learn(ids, targets):
        hidden_t, scores_t = targets
        with torch.autocast(device_type, torch.bfloat16, enabled=is_bf16):
            hidden, scores = taps(student, ids)
            attention = [mse(s.float(), t.float()) for s, t in zip(scores, scores_t, strict=True)]
            states = [mse(fit(s).float(), t.float()) for s, t in zip(hidden, hidden_t, strict=True)]
            return sum(attention) + sum(states)

    return teach, learn


def torch_mlm(work: Work, settings: Settings, gathered: bool) -> Ready:
    import torch

    device = _torch_device(settings.tiny)
    model = _torch_model("AutoModelForMaskedLM", work.student, device, "sdpa")
    model.train()
    num_masked = max(round(MASK_RATE * work.width), 1)
    generator = np.random.default_rng(1)
    given = []
    for ids in token_ids(work):
        order = generator.permuted(np.tile(np.arange(work.width), (len(ids), 1)), axis=1)
        places = np.sort(order[:, :num_masked], axis=1)
        masked, labels = ids.copy(), np.full_like(ids, -100)
        np.put_along_axis(labels, places, np.take_along_axis(ids, places, 1), 1)
        np.put_along_axis(masked, places, MASK_TOKEN_ID, 1)
        arrays = (masked, labels)
        if gathered:
            flat = (places + work.width * np.arange(len(ids))[:, None]).ravel()
            arrays = (masked, labels.ravel()[flat], flat)
        given.append(tuple(torch.from_numpy(array).long().to(device) for array in arrays))

    def whole(ids, labels):
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=labels).loss

    def at_masked(ids, labels, places):
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.bert(input_ids=ids).last_hidden_state
            logits = model.cls(hidden.flatten(0, 1)[places])
            return torch.nn.functional.cross_entropy(logits.float(), labels)

    loss = at_masked if gathered else whole
    return _torch_rounds(
        lambda compiled: compiled(loss), list(model.parameters()), given, work, settings, device
    )


def _torch_device(tiny: bool):
    import torch

    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("expected a GPU, got none; give --tiny for a trial without")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def _torch_model(kind: str, sizes: dict[str, int], device, attention: str):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.AttentionInterface.register("scores", _attention_that_tells)
    options = {"add_pooling_layer": False} if kind == "AutoModel" else {}
    torch.manual_seed(0)
    with device:
        return getattr(transformers, kind).from_config(
            transformers.BertConfig(**{"vocab_size": 30522} | sizes),
            attn_implementation=attention,
            dtype=torch.float32,
            **options,
        )


def _attention_that_tells(
    module, query, key, value, attention_mask, scaling, dropout=0.0, *, scores, **unused
):
    """transformers' eager attention without a mask; appends its raw scores to the list `scores`."""
    import torch

    raw = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores.append(raw)
    weights = torch.nn.functional.dropout(raw.softmax(-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def _torch_rounds(
    make_loss: Callable, trained: list, given: list[tuple], work: Work, settings: Settings, device
) -> Ready:
    """`make_loss(compiled)` makes the loss with `compiled` around each function to compile."""
    import torch

    optimizer = torch.optim.AdamW(
        trained, lr=sides.LEARNING_RATE, weight_decay=0.01, eps=1e-6, fused=True
    )
    loss, note = make_loss(lambda function: function), "eager"
    if not settings.tiny:
        loss, note = _torch_compiled(make_loss, loss, given[0])
    optimizer.zero_grad()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = itertools.cycle(given)

    def run() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(settings.num_steps):
            loss(*next(batches)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return settings.num_steps * work.batch_size * work.width, seconds

    def told() -> tuple[str, int | None]:
        if not on_gpu:
            return "cpu", None
        return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()

    return Ready(run, told, note)


def _torch_compiled(make_loss: Callable, eager: Callable, batch: tuple) -> tuple[Callable, str]:
    """The compiled loss, tried forwards and backwards; or `eager`, and a note that says why."""
    import torch
    from torch._dynamo.utils import counters

    try:
        loss = make_loss(lambda function: torch.compile(function, dynamic=False))
        loss(*batch).backward()
    except Exception as error:  # a peer in eager mode is a figure too, as long as it says so
        torch._dynamo.reset()
        first_line = (str(error).strip() or "no message").split("\n")[0][:120]
        return eager, f"EAGER, compile failed: {type(error).__name__}: {first_line}"
    breaks = sum(counters["graph_break"].values())
    return loss, "compiled" + (f", {breaks} graph breaks" if breaks else "")


if __name__ == "__main__":
    main()
