"""What the teachers say of the task's text, made once and kept: the prediction stage's targets."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinybert_jax.convert import hf_files
from tinybert_jax.data.pipeline import TokenRows
from tinybert_jax.evaluate import make_scorer
from tinybert_jax.model.heads import make_classifier
from tinybert_jax.run import Run, compute_options


class _Teacher(NamedTuple):
    path: str | Path
    weight: float
    apply: Any
    params: Any


def read_logits(run: Run, stage: str, rows: TokenRows) -> np.ndarray:
    """The weighted mean of all teachers' logits, fp32 [rows, outputs].

    Kept in `teacher_logits/<hash>.safetensors` of the run folder: the hash is of the rows, of how
    they are batched and of every teacher's weights, so that no other logits are ever taken for
    them. Raises ValueError where a file is there and is not such an array.
    """
    teachers = _read_teachers(run)
    section = run.section(stage)
    layout = {
        "batching": section.batching,
        "widths": section.buckets(),
        "dtype": run.config.compute.dtype,
        "rows": rows.fingerprint(),
        "teachers": [[_hash(own.params), own.weight] for own in teachers],
    }
    key = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()
    file = run.folder / "teacher_logits" / f"{key}.safetensors"
    shape = (len(rows.lengths), run.data.num_outputs)
    if file.is_file():
        return _load(file, shape)
    run.log.say(f"{stage}: {shape[0]:,} examples go through {_names(teachers)}, once")
    each = [_score(run, section, own, rows) for own in teachers]
    logits = np.average(each, axis=0, weights=[own.weight for own in teachers]).astype(np.float32)
    _check_finite(logits, teachers)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"logits": logits}, partial)
    partial.rename(file)
    return logits


def _read_teachers(run: Run) -> list[_Teacher]:
    given = [(run.task_teacher, 1.0)]
    given += [(own.path, own.weight) for own in run.config.distillation.further_teachers]
    teachers = []
    for path, weight in given:
        sizes = hf_files.read_model(path).config
        apply, init = make_classifier(sizes, run.data.num_outputs, **compute_options(run.config))
        params = hf_files.start_params(path, init, whole=True)
        teachers.append(_Teacher(path, weight, apply, params))
    return teachers


def _score(run: Run, section: Any, teacher: _Teacher, rows: TokenRows) -> np.ndarray:
    score = make_scorer(
        teacher.apply,
        buckets=section.buckets(),
        pad_token_id=run.tokenizer.pad_token_id,
        packed=section.batching == "pack",
    )
    return score(teacher.params, rows)


def _hash(params: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _load(file: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        logits = load_file(file)["logits"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{file}: expected the teachers' logits {list(shape)}, got a file that cannot be read "
            f"({error}); delete it, and they are made again"
        ) from None
    if logits.shape != shape:
        raise ValueError(
            f"{file}: expected logits of shape {list(shape)}, got {list(logits.shape)}; delete it, "
            "and they are made again"
        )
    return logits


def _check_finite(logits: np.ndarray, teachers: Sequence[_Teacher]) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{_names(teachers)}: expected finite logits, got {logits[bad[0]].tolist()} for "
            f"example {bad[0] + 1} of the task's text and {bad.size - 1} more; use another teacher"
        )


def _names(teachers: Sequence[_Teacher]) -> str:
    return ", ".join(str(own.path) for own in teachers)
