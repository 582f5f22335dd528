"""The weights that a student starts from: an earlier stage's, a folder's, or its teacher's."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from tinybert_jax.config.models import Student
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import HeadSection
from tinybert_jax.huggingface.encoder_decoder import start_any
from tinybert_jax.models.heads import make_encoder
from tinybert_jax.models.params import Apply, Params
from tinybert_jax.objectives.alignment import (
    PROJECTIONS,
    init_projection,
    start_from_teacher_embeddings,
    start_from_teacher_layers,
    start_from_teacher_sides,
)
from tinybert_jax.objectives.objective import encoder_inputs
from tinybert_jax.objectives.reduction import (
    reduction_directions,
    refit_norms,
    start_from_reduced_teacher,
)
from tinybert_jax.runs.head_init import init_head
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage_batches import StageBatches
from tinybert_jax.settings.layer_maps import make_layer_pairs
from tinybert_jax.settings.sizes import EncoderDecoderConfig, Side, Sizes, depths, side_of
from tinybert_jax.terms.table import projected_sides


def make_init(
    run: Run,
    plan: StagePlan,
    student: Student,
    model: tuple[Apply, Callable[[jax.Array], Params]],
    teacher_start: Callable[[], Mapping[str, Any]],
    batches: StageBatches,
) -> Callable[[jax.Array, int], dict[str, Any]]:
    """init_params(key, index of the seed): initial {student} or {student, projection}.

    They come from an earlier stage that is done, else from the student's folder, else from `init`
    and the teacher. `model`: (apply, init). `batches`: text for the starts that read the teacher's
    states or fit the head.
    """
    apply, init = model
    reduced: list[tuple[dict[str, Any], np.ndarray]] = []

    def reduce(encoder: Params, layers: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
        """(encoder, directions) in fewer dimensions; computed once, as seeds have it in common."""
        if not reduced:
            reduced.append(_reduce(run, student, encoder, teacher_start(), layers, batches))
        ours, directions = reduced[0]
        return {**encoder, "embeddings": ours["embeddings"], "layers": ours["layers"]}, directions

    def init_params(key: jax.Array, seed: int) -> Params:
        earlier = plan.stage.starts_from
        done = [run.find_model(name, member=student.name, seed=seed) for name in earlier]
        folders = [*(folder for folder in done if folder is not None), student.section.path]
        start = functools.partial(
            _start, run, student, folders[0], init, teacher_start, reduce, is_quiet=seed > 0
        )
        sides = projected_sides(plan.terms, student.sizes, run.teacher)
        student_key, projection_key = jax.random.split(key) if sides else (key, key)
        params, directions = start(student_key)
        if isinstance(plan.section, HeadSection) and plan.section.head_init == "linear_probe":
            params = init_head(run, plan.name, apply, params, batches, is_quiet=seed > 0)
        found = _start_projections(run, student, sides, folders, projection_key, directions)
        return {"student": params, **found}

    return init_params


def _start(
    run: Run,
    student: Student,
    start: str | Path | None,
    init: Callable[[jax.Array], Params],
    teacher_start: Callable[[], Mapping[str, Any]],
    reduce: Callable[[Params, Sequence[int]], tuple[dict[str, Any], np.ndarray]],
    key: jax.Array,
    *,
    is_quiet: bool,
) -> tuple[Params, np.ndarray | None]:
    """(student, directions): initial parameters of a student.

    `directions`: those that the teacher's embeddings were projected on; None unless the student
    starts from `teacher_embeddings` or `teacher_reduced`.
    """
    label_names = run.task.data.label_names if run.task else None
    params = start_any(start, init, key, label_names=label_names, is_quiet=is_quiet)
    if start is not None or student.section.init == "random":
        return params, None
    if isinstance(student.sizes, EncoderDecoderConfig):
        return start_from_teacher_sides(params, teacher_start(), *_layers(run, student)), None
    encoder, directions = encoder_of(params), None
    if student.section.init == "teacher_embeddings":
        encoder, directions = start_from_teacher_embeddings(encoder, teacher_start())
    elif student.section.init == "teacher_layers":
        encoder = start_from_teacher_layers(encoder, teacher_start(), *_layers(run, student))
    else:
        encoder, directions = reduce(cast(Params, encoder), *_layers(run, student))
    return ({**params, "encoder": encoder} if "encoder" in params else encoder), directions


def _layers(run: Run, student: Student) -> Iterator[list[int]]:
    """The layers of the teacher that a student starts from: of each side that it has."""
    for ours, theirs in zip(depths(student.sizes), depths(run.teacher), strict=True):
        if ours:
            pairs = make_layer_pairs(student.section.init_layers, ours, theirs)
            yield [layer for _, layer in pairs]


def make_random(
    run: Run, plan: StagePlan, student: Student, init: Callable[[jax.Array], Params]
) -> Callable[[jax.Array], dict[str, Any]]:
    """random_params(key): the student and its projections in the shapes of `make_init`'s."""

    def random_params(key: jax.Array) -> dict[str, Any]:
        sides = projected_sides(plan.terms, student.sizes, run.teacher)
        found = {PROJECTIONS[side]: _new_projection(run, student, side, key) for side in sides}
        return {"student": init(key), **found}

    return random_params


_SAMPLE = 4096  # tokens whose states the reduction reads


def _reduce(
    run: Run,
    student: Student,
    encoder: Params,
    teacher: Mapping[str, Any],
    layers: Sequence[int],
    batches: StageBatches,
) -> tuple[dict[str, Any], np.ndarray]:
    """(encoder, directions) of a student that starts from the teacher in fewer dimensions."""
    sample, num_tokens = [], 0
    while num_tokens < _SAMPLE and len(sample) < batches.num_batches:
        batch = jax.device_put(batches.batch_at(len(sample)))
        sample.append((*encoder_inputs(batch), np.asarray(batch.real)))
        num_tokens += int(sample[-1][-1].sum())

    def states_of(sizes: Sizes, like: Any) -> Callable[[Any], list[np.ndarray]]:
        apply, _ = make_encoder(side_of(sizes, "encoder"), has_pooler="pooler" in like)
        hidden = jax.jit(lambda params, *inputs: apply(params, *inputs).hidden)

        def states(params: Any) -> list[np.ndarray]:
            parts = [
                [np.asarray(own)[real] for own in hidden(params, text, mask)]
                for text, mask, real in sample
            ]
            return [np.concatenate(own) for own in zip(*parts, strict=True)]

        return states

    theirs = states_of(run.teacher, teacher)(teacher)
    directions = reduction_directions(theirs, student.sizes.hidden_size)
    num_heads = student.sizes.num_attention_heads
    reduced = start_from_reduced_teacher(encoder, teacher, layers, theirs, directions, num_heads)
    targets = [theirs[entry] @ directions for entry in (0, *layers)]
    return refit_norms(reduced, states_of(student.sizes, reduced), targets), directions


def encoder_of(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoder's part of the parameters of a model with or without a head."""
    return params.get("encoder", params)


def _start_projections(
    run: Run,
    student: Student,
    sides: Sequence[Side],
    folders: Sequence[str | Path | None],
    key: jax.Array,
    directions: np.ndarray | None,
) -> dict[str, Any]:
    """For each side the projection of the first folder that has its file, else a new one."""
    found: dict[str, Any] = {}
    given = [Path(folder).expanduser() for folder in folders if folder is not None]
    for number, side in enumerate(sides):
        own_key = jax.random.fold_in(key, number) if number else key
        projection = _new_projection(run, student, side, own_key)
        files = (folder / projection_file(PROJECTIONS[side]) for folder in given)
        saved = next((file for file in files if file.is_file()), None)
        if saved is not None:
            projection = _load_projection(saved, projection)
        elif directions is not None:
            num_projections = len(projection["kernel"])
            projection["kernel"] = jnp.tile(directions.T[None], (num_projections, 1, 1))
        found[PROJECTIONS[side]] = projection
    return found


def projection_file(name: str) -> str:
    """The file of a projection of `PROJECTIONS`, beside the student's weights in its folder."""
    return f"{name}.safetensors"


def _new_projection(run: Run, student: Student, side: Side, key: jax.Array) -> dict[str, Any]:
    ours, theirs = side_of(student.sizes, side), side_of(run.teacher, side)
    num_projections = 1
    if run.distillation.projection == "per_layer":
        num_projections = ours.num_hidden_layers + 1
    return init_projection(key, ours.hidden_size, theirs.hidden_size, num_projections)


def _load_projection(file: Path, expected: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    loaded = load_file(file)
    for name, array in expected.items():
        if name not in loaded or loaded[name].shape != array.shape:
            got = list(loaded[name].shape) if name in loaded else "none"
            raise ValueError(
                f"{file}: expected {name} of shape {list(array.shape)}, got {got}; set "
                "distillation.projection back, or delete the file to start a new projection"
            )
    return loaded
