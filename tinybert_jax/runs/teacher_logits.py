"""Teacher logits of the task's text: computed once and kept in the run folder.

The file `teacher_logits/<hash>/<row>.safetensors` of the run folder holds one teacher's logits from
row number `row` on. The hash covers everything that the logits depend on: the rows, their batching,
the teacher's weights and sizes. A killed run resumes after the last complete file.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinybert_jax.batches.batch import TokenRows
from tinybert_jax.config.run import StagePlan
from tinybert_jax.models.params import sha256
from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk
from tinybert_jax.runs import shared_folder
from tinybert_jax.runs.judges import make_stage_scorer
from tinybert_jax.runs.run import Run, load_frozen, num_outputs, place_frozen_params
from tinybert_jax.settings.sizes import Sizes

ROWS_PER_FILE = 2**14


def read(run: Run, plan: StagePlan, rows: TokenRows) -> tuple[np.ndarray, str]:
    """(logits, SHA-256): the weighted mean of all teachers' logits, fp32 [rows or tokens, outputs].

    Computes the logits that no file holds yet. The SHA-256 covers everything that the mean depends
    on. Raises ValueError for logits that are not finite and for a damaged file.
    """
    own = run.own_teachers or [run.task_teacher]
    teachers = [(1.0 / len(own), path, run.teacher) for path in own]
    teachers += [(t.section.weight, t.section.path, t.sizes) for t in run.further_teachers]
    weights = [weight for weight, _, _ in teachers]
    by_teacher = [_read_teacher(run, plan, rows, path, sizes) for _, path, sizes in teachers]
    mean = np.average([logits for logits, _ in by_teacher], axis=0, weights=weights)
    content = json.dumps([weights, [key for _, key in by_teacher]])
    return mean.astype(np.float32), hashlib.sha256(content.encode()).hexdigest()


def zeros(run: Run, rows: TokenRows) -> tuple[np.ndarray, str]:
    """As `read`, with zeros for logits: for a program that is compiled and does not run."""
    return np.zeros((rows.num_scored, num_outputs(run, run.teacher)), np.float32), ""


def _read_teacher(
    run: Run, plan: StagePlan, rows: TokenRows, path: str | Path, sizes: Sizes
) -> tuple[np.ndarray, str]:
    """(logits, key) of one teacher; the key is the name of the folder with the logits."""
    section, num_rows = plan.section, len(rows.lengths)
    apply, params = load_frozen(run, path, sizes)
    depends_on = {
        "rows": rows.fingerprint(),
        "batching": section.batching,
        "widths": section.buckets(),
        "dtype": run.compute.frozen_dtype,
        "sizes": sizes.model_dump(exclude_none=True),
        "weights": sha256(params),
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = run.folder / "teacher_logits" / key
    processes.on_main("logits", lambda: disk.make_folder(folder))
    score = make_stage_scorer(run, apply, section)
    parts, placed = [], place_frozen_params(run, params)
    for start in range(0, num_rows, ROWS_PER_FILE):
        stop, file = min(start + ROWS_PER_FILE, num_rows), folder / f"{start}.safetensors"
        part = rows.part(start, stop)
        if not processes.from_main("kept logits", file.is_file):
            with run.log.doing(f"{path} scores examples {start + 1:,} to {stop:,}"):
                logits = score(placed, part)
            _check_finite(logits, path, start)
            processes.on_main("logits", functools.partial(_save, logits, file))
            shared_folder.wait_until(file.is_file, str(file))
            run.log.say(f"{plan.name}: {path} has scored {stop:,} of {num_rows:,} examples")
        parts.append(_load(file, (part.num_scored, num_outputs(run, sizes))))
    return np.concatenate(parts), key


def _save(logits: np.ndarray, file: Path) -> None:
    partial = file.with_suffix(".partial")
    content = hashlib.sha256(logits.tobytes()).hexdigest()
    save_file({"logits": logits}, partial, metadata={"sha256": content})
    disk.sync(partial)
    partial.rename(file)
    disk.sync(file.parent)


def _load(file: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        with safe_open(file, "numpy") as opened:
            logits = opened.get_tensor("logits")
            content = (opened.metadata() or {}).get("sha256")
    except SafetensorError as error:
        problem = f"a file that cannot be read ({error})"
    else:
        is_whole = hashlib.sha256(logits.tobytes()).hexdigest() == content
        if is_whole and logits.shape == shape and logits.dtype == np.float32:
            return logits
        problem = f"other content, {logits.dtype} {list(logits.shape)}"
    raise ValueError(
        f"{file}: expected a teacher's logits as they were written, float32 {list(shape)}, got "
        f"{problem}; delete the file, and the run computes the logits again"
    )


def _check_finite(logits: np.ndarray, path: str | Path, start: int) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{path}: expected finite logits, got {logits[bad[0]].tolist()} for example "
            f"{start + bad[0] + 1} of the task's text, and {bad.size - 1} more; use another teacher"
        )
