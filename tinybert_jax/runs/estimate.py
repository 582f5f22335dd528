"""Estimates the steps, FLOPs, memory and time of each stage, before the run starts.

`performance.flops` counts the FLOPs. Nothing is trained or written.
"""

import datetime
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.models.heads import make_masked_lm
from tinybert_jax.objectives.objective import decoder_inputs, encoder_inputs
from tinybert_jax.parallel.mesh import num_batch_shards, platform_of, runs_seeds_sequentially
from tinybert_jax.performance import flops as model_flops
from tinybert_jax.performance.device_peaks import measure_gemm_peak, peak_flops
from tinybert_jax.report.tables import format_si
from tinybert_jax.runs.run import (
    Run,
    frozen_options,
    make_task_model,
    trained_options,
    with_dropout,
)
from tinybert_jax.runs.stage_batches import make_stage_batches
from tinybert_jax.runs.workload import (
    Words,
    Work,
    count_last_layer_examples,
    count_last_layer_tokens,
    projected,
    words_of,
    work_of,
)
from tinybert_jax.settings.sizes import Side, Sizes, side_of
from tinybert_jax.terms.term import Row, Tap

_NUM_SAMPLED = 64  # batches that the estimate reads
_UTILISATION = 0.4  # assumed share of the peak FLOP/s
_DEVICES = (("H200", "NVIDIA H200"), ("v5e", "TPU v5e"), ("v6e", "TPU v6e"))
_FP32 = 4  # bytes


class Costs(NamedTuple):
    """Costs of a stage, estimated from some of its batches; a slot is a token or padding."""

    num_steps: int
    num_tokens: float  # in the whole stage, without padding
    num_slots: float  # in the whole stage
    width: int  # tokens per row of the widest sampled batch
    flops: dict[str, float]  # of the whole stage, by part
    state_bytes: float  # per device
    activation_bytes: float  # per device

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


def describe(run: Run, plans: Sequence[StagePlan]) -> str:
    """Steps, tokens, parameters, FLOPs by part, memory and time of each stage that is not done.

    The time is that of the training steps at 40 % of one device's peak FLOP/s in the run's compute
    dtype. The peak is measured on this CPU; other devices have the vendors' figures
    (`performance.device_peaks.peak_flops`).
    """
    dtype = run.compute.dtype.removesuffix("_products")
    by_stage = {p.name: estimate_costs(run, p) for p in plans if not run.is_done(p.name)}
    peaks = _peaks(dtype) if by_stage else {}
    parts = [
        _description(run, plan, by_stage[plan.name], peaks)
        if plan.name in by_stage
        else f"{plan.name}: done before"
        for plan in plans
    ]
    if len(by_stage) > 1:
        total = sum(costs.total_flops for costs in by_stage.values())
        parts.append(f"together: {total:.3g} FLOPs\n{_time_line(total, peaks)}")
    if by_stage:
        parts.append(
            f"Times are estimates for one device at {_UTILISATION:.0%} of its {dtype} peak; small "
            "models reach less, busy machines too, and compiling and scoring come on top."
        )
    return "\n\n".join(parts)


def estimate_costs(run: Run, plan: StagePlan) -> Costs:
    """Estimates the costs of a stage from 64 batches, spread from its first step to its last.

    FLOPs, by part: `forward` and `backward` (two forward passes) of the trained encoders;
    `teacher`, one forward pass of its encoder; `projection`, forward and backward of the hidden
    states that terms read; `words`, forward and backward of the masked-LM heads where tokens are
    predicted. The last layer counts only at the tokens at which it runs. Not counted: the heads of
    whole rows, and the products of queries and keys in the terms. A teacher whose logits are kept
    runs once over the text.

    State: for every student and its projection the parameters, gradients, two moments and, if
    kept, the moving average, all fp32; for the teacher the parameters, with layers of 2 bytes per
    value for bfloat16 products and 1 byte for int8 and float8 products. Activations of one
    microbatch of the largest sampled batch: the residuals of differentiating the students'
    encoders, from a trace of the same model without compilation, on a CPU for one seed at a time;
    the teacher's arrays that
    terms read; the projected hidden states; the score maps that terms build; one chunk of logits.
    For fp32 steps with scanned layers and the terms of tinybert, minilmv2 and distilbert the
    estimate was within 15 % of XLA:CPU's `memory_analysis`.
    """
    section, work = plan.section, work_of(run, plan)
    stage_batches = make_stage_batches(run, plan)
    num_steps = stage_batches.num_steps(section)
    steps = np.unique(np.linspace(0, num_steps - 1, _NUM_SAMPLED).astype(int))
    batches = [stage_batches.batch_at(int(step)) for step in steps]
    words = [
        words_of(run, plan, batch, float(step / max(num_steps - 1, 1)))
        for step, batch in zip(steps, batches, strict=True)
    ]
    counts = [count_last_layer_tokens(run, plan, b.shape[1], b.num_segments) for b in batches]
    flops = [batch_flops(work, *inputs) for inputs in zip(batches, words, counts, strict=True)]
    parts = {name: num_steps * float(np.mean([f[name] for f in flops])) for name in flops[0]}
    if work.logit_teachers:
        parts["teacher"] = parts.get("teacher", 0.0) + stage_batches.num_batches * float(
            np.mean(
                [
                    _forward_flops(work.logit_teachers, b, count_last_layer_examples(run, b))
                    for b in batches
                ]
            )
        )
    largest = max(range(len(batches)), key=lambda i: batches[i].num_slots)
    return Costs(
        num_steps,
        num_steps * float(np.mean([np.count_nonzero(b.attention_mask) for b in batches])),
        num_steps * float(np.mean([b.num_slots for b in batches])),
        max(b.shape[1] for b in batches),
        parts,
        _state_bytes(run, section, work),
        _activation_bytes(run, plan, work, batches[largest], words[largest]),
    )


def _peaks(dtype: str) -> dict[str, float]:
    """Peak FLOP/s of one device, by the name of the device."""
    peaks = {"this CPU": measure_gemm_peak(dtype)}
    for name, kind in _DEVICES:
        peak = peak_flops(kind, dtype)
        assert peak is not None, kind
        peaks[name] = peak
    return peaks


def _description(run: Run, plan: StagePlan, costs: Costs, peaks: dict[str, float]) -> str:
    work, devices = work_of(run, plan), run.mesh.size
    times = f" × {work.num_seeds} seeds" if work.num_seeds > 1 else ""
    lines = [
        f"{plan.name}: {costs.num_steps:,} steps, {format_si(costs.num_tokens)} tokens in "
        f"{format_si(costs.num_slots)} slots "
        f"({1 - costs.num_tokens / costs.num_slots:.0%} padding), rows of up to {costs.width}",
        *(
            f"  trained   {f'{name}, ' if name else ''}{_size(model, times)}"
            for name, model in work.trained.items()
        ),
    ]
    if work.teacher:
        lines.append(f"  teacher   {_size(work.teacher)}")
    lines += [f"  teacher   {_size(model)}, once over the text" for model in work.logit_teachers]
    parts = (f"{name} {format_si(value / costs.num_slots)}" for name, value in costs.flops.items())
    lines.append(f"  FLOPs     per slot: {', '.join(parts)}; whole stage {costs.total_flops:.3g}")
    lines.append(
        f"  memory    {f'on each of {devices} devices ' if devices > 1 else ''}"
        f"{format_si(costs.state_bytes, 'B')} of state, "
        f"{format_si(costs.activation_bytes, 'B')} of activations"
    )
    lines.append(_time_line(costs.total_flops, peaks))
    return "\n".join(lines)


def _time_line(flops: float, peaks: dict[str, float]) -> str:
    times = (f"{name} {_clock(flops / peak / _UTILISATION)}" for name, peak in peaks.items())
    return f"  time      {', '.join(times)}"


def _size(model: Sizes, times: str = "") -> str:
    whole, layers = (
        float(model_flops.num_parameters(model)),
        float(model_flops.num_encoder_parameters(model)),
    )
    return f"{format_si(whole)} parameters{times}, {format_si(layers)} of them in layers"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=math.ceil(seconds)))


def batch_flops(
    work: Work, batch: Batch, words: Words | None, num_last_layer_tokens: int | None
) -> dict[str, float]:
    """FLOPs of one batch by part; `estimate_costs` lists the parts."""
    slots, models = batch.num_slots, work.trained.values()
    num_passes = work.num_seeds * work.num_passes
    forward = num_passes * _forward_flops(models, batch, num_last_layer_tokens)
    parts = {"forward": forward, "backward": 2 * forward}
    if work.teacher:
        parts["teacher"] = _forward_flops((work.teacher,), batch, num_last_layer_tokens)
        to_width = work.teacher.hidden_size
        once = sum(
            model_flops.projection_flops_per_token(
                model, to_width, len(set(projected(work, model)))
            )
            for model in models
        )
        if once:
            parts["projection"] = 3 * slots * work.num_seeds * once
    if words:
        once = sum(model_flops.masked_lm_flops(m, words.mapped, words.student) for m in models)
        parts["words"] = 3 * work.num_seeds * once
        if work.teacher and words.teacher:
            parts["words"] += model_flops.masked_lm_flops(work.teacher, words.mapped, words.teacher)
    return parts


def _forward_flops(
    models: Iterable[Sizes], batch: Batch, num_last_layer_tokens: int | None
) -> float:
    slots, width = batch.num_slots, batch.shape[1]
    return slots * sum(
        model_flops.forward_flops_per_token(
            model, width, num_last_layer_tokens=num_last_layer_tokens
        )
        for model in models
    )


def _state_bytes(run: Run, section: StageSection, work: Work) -> float:
    copies = 4 + (section.average_decay is not None) + (section.decay_towards == "start")
    trained = sum(model_flops.num_parameters(model) for model in work.trained.values())
    frozen = model_flops.num_parameters(work.teacher) if work.teacher else 0
    if work.teacher:
        # Kernels are kept rounded; the memory of biases, scales and LayerNorms is negligible.
        num_bytes = _LAYER_BYTES[run.compute.frozen_dtype]
        frozen -= model_flops.num_encoder_parameters(work.teacher) * (1 - num_bytes / _FP32)
        is_shared = run.distillation.projection == "shared"
        for model in work.trained.values():
            sides: set[Side] = {side for side, _ in projected(work, model)}
            for side in sides:
                ours, theirs = side_of(model, side), side_of(work.teacher, side)
                num_projections = 1 if is_shared else ours.num_hidden_layers + 1
                trained += num_projections * (ours.hidden_size + 1) * theirs.hidden_size
    split = run.mesh.shape["fsdp"] * run.mesh.shape["tensor"]
    return _FP32 * (copies * work.num_seeds * trained + frozen) / split


def _activation_bytes(
    run: Run, plan: StagePlan, work: Work, batch: Batch, words: Words | None
) -> float:
    section = plan.section
    num_parts = num_batch_shards(run.mesh) * section.gradient_accumulation_steps
    num_rows, width = batch.shape[0] / num_parts, batch.shape[1]
    values = num_rows * width * (work.teacher.hidden_size if work.teacher else 0)
    students = teacher = 0.0
    for model in work.trained.values():
        students += work.num_passes * num_rows * _saved_bytes_a_row(run, plan, model, batch)
        if work.teacher:
            students += _FP32 * values * len(projected(work, model))
            students += _FP32 * num_rows * _num_pairs_in_maps(run, work, model, batch)
        if words:
            num_copies = 2 + bool(words.teacher)  # the student's logits and their gradient
            students += _FP32 * num_copies * words.chunk * model.vocab_size
    if work.teacher:
        itemsize = frozen_options(run.compute)["dtype"].itemsize
        num_taps, num_pairs = _num_taps(run, work, batch)
        teacher = itemsize * values * num_taps + _FP32 * num_rows * num_pairs
    num_at_a_time = 1 if runs_seeds_sequentially(run.mesh) else work.num_seeds
    return num_at_a_time * students + teacher


def _saved_bytes_a_row(run: Run, plan: StagePlan, model: Sizes, batch: Batch) -> int:
    """Bytes of residuals that differentiating the encoder keeps per row, score maps included.

    Where the heads read few tokens, the residuals of the masked-LM head count too; those of a
    classifier are negligible.
    """
    # The same estimate on any machine, whatever attention backend the machine has.
    options = trained_options(run.compute, plan) | {"attention": "xla"}
    sizes = with_dropout(model, plan.section)
    translates = run.task is not None and run.task.kind.generates
    if translates:
        apply, init = make_task_model(run, sizes, **options)
    else:
        apply, init = make_masked_lm(side_of(sizes, "encoder"), **options)
    num_last_layer_tokens = count_last_layer_tokens(run, plan, batch.shape[1], batch.num_segments)
    key = jax.random.key(0)
    params = jax.eval_shape(init, key)

    def outputs(params, key, batch):
        inputs = (params, *encoder_inputs(batch), key)
        if translates:
            return apply(*inputs, **decoder_inputs(batch)).hidden
        if num_last_layer_tokens is None:
            return apply(*inputs, taps=True).encoder.hidden[-1]
        positions = jnp.zeros((batch.shape[0], num_last_layer_tokens), jnp.int32)
        return apply(*inputs, positions=positions).hidden

    def saved(params, key, batch):
        return jax.vjp(lambda params: outputs(params, key, batch), params)[1]

    def num_bytes(num_rows: int) -> int:
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype), batch
        )
        leaves = jax.tree.leaves(jax.eval_shape(saved, params, key, rows))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return num_bytes(2) - num_bytes(1)


def _num_pairs_in_maps(run: Run, work: Work, student: Sizes, batch: Batch) -> int:
    """Number of entries of the [query, key] score maps that terms build per row."""
    if work.teacher is None:
        return 0
    row = _row(run, batch)
    return sum(term.num_map_entries(student, work.teacher, row) for term in work.terms)


def _row(run: Run, batch: Batch) -> Row:
    """The layout of the rows; on a CPU, unrolled fp32 layers keep their score maps."""
    compute = run.compute
    is_float32 = not {"bfloat16", "float8_products"} & {compute.dtype, compute.frozen_dtype}
    is_packed = batch.attention_mask.dtype != bool
    keeps_maps = compute.unroll_layers and is_float32 and platform_of(run.mesh) == "cpu"
    return Row(batch.shape[1], is_packed, keeps_maps)


def _num_taps(run: Run, work: Work, batch: Batch) -> tuple[int, int]:
    """(number of [slots, dim] arrays of the teacher that terms read, entries of maps per row).

    A scan over layers returns the arrays of all layers, so all of them count.
    """
    assert work.teacher is not None
    row, teacher = _row(run, batch), work.teacher
    taps: set[Tap] = set()
    for term, student in itertools.product(work.terms, work.trained.values()):
        for tap in term.teacher_taps(student, teacher, row):
            is_scanned = tap.layer > 0 and not run.compute.unroll_layers
            depth = side_of(teacher, tap.side).num_hidden_layers
            layers = range(1, depth + 1) if is_scanned else [tap.layer]
            taps |= {Tap(tap.kind, layer, tap.side) for layer in layers}
    num_maps = sum(tap.kind == "maps" for tap in taps)
    entries = num_maps * teacher.num_attention_heads * batch.shape[1] ** 2
    return len(taps) - num_maps, entries


_LAYER_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "bfloat16_products": 2,
    "int8_products": 1,
    "float8_products": 1,
}
