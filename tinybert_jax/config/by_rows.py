"""The recipe `by_rows`: settings that follow from the number of rows and the teacher's sizes.

A config with `recipe: by_rows` may leave out the sections student, finetune, intermediate,
prediction, baseline and compute, or any settings in them, and the dev set; those that it gives stay
as they are. `configs/own-text.yaml` and `tinybert run --data` add nothing but text and teacher.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinybert_jax.settings.section import ComputeDtype

NAME = "by_rows"


class Facts(NamedTuple):
    """What the recipe has to know of the text and the teacher."""

    num_labelled: int  # rows with labels, without those of dev
    num_unlabelled: int
    hidden_size: int  # of the teacher
    num_layers: int
    num_heads: int
    fast_dtype: ComputeDtype = "float32"  # the fastest dtype that the machine trains well in
    intermediate_size: int | None = None  # of the teacher; None: four times its hidden size
    num_positions: int | None = None  # of the teacher; None: enough for every length here


TYPICAL = Facts(10_000, 0, 384, 6, 12)


class Length(NamedTuple):
    """The length of a stage: about `steps` steps, in whole epochs from `least` to `most`."""

    steps: int
    least: int
    most: int

    def epochs(self, num_rows: int, global_batch_size: int) -> int:
        if num_rows >= _MANY_ROWS:
            return 1
        wanted = self.steps * global_batch_size / max(num_rows, 1)
        return min(max(math.ceil(wanted), self.least), self.most)


LENGTHS = {
    "finetune": Length(400, 3, 15),
    "intermediate": Length(250, 2, 12),
    "prediction": Length(250, 2, 12),
    "baseline": Length(600, 3, 30),
}
_BATCH, _SMALL_BATCH = 32, 16
_NUM_SMALL = 3000  # fewer rows than this have `_SMALL_BATCH`
_FEW_ROWS = 2000  # too few to set rows apart that choose a checkpoint: the last one is kept
_MANY_ROWS = 200_000  # an epoch is long enough
_DEV_SHARE = _SELECT_SHARE = 0.1
_NEVER = 100  # times the steps of a stage
_WIDTH = 128  # the default of max_length
_ANSWER_WIDTH = 384  # tokens of a window in which answers are looked for
_WIDE = 512  # teachers above it have students of their own width no more, and lower rates
_FAST, _SLOW = 1e-4, 3e-5  # learning rates of models that start from trained weights
_NARROW, _DEEPEST = 312, 4  # of the students of wide teachers


def fill(tree: Mapping[str, Any], facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """(the config with all settings of the recipe, what was chosen and why: a line each).

    `tree`: a config as YAML holds it, with `recipe`; the result has none. Raises ValueError for a
    value where a section is expected.
    """
    filled = {name: value for name, value in tree.items() if name != "recipe"}
    lines: list[str] = []
    filled["task"], share = _task(_section("task", tree.get("task")), facts, lines)
    filled["compute"] = _compute(_section("compute", tree.get("compute")), facts, lines)
    students = _students(filled, facts, lines)
    num_rows = round(facts.num_labelled * (1 - share))
    num_distilled = num_rows + facts.num_unlabelled
    is_inherited = all(
        student.get("path") or student.get("init") in _INHERITED for student in students
    )
    finds_answers = filled["task"].get("kind") == "question_answering"
    has_kept_logits = not _NOT_KEPT & set(_section("distillation", tree.get("distillation")))
    for name, length in LENGTHS.items():
        is_given = name in filled
        if is_given and filled[name] is None:  # `baseline: null` leaves the stage out
            continue
        if name == "finetune" and _section("teacher", tree.get("teacher")).get("finetuned"):
            continue
        rows = num_distilled if name in ("intermediate", "prediction") else num_rows
        given = _section(name, filled.get(name))
        if given.get("global_batch_size") is None:
            given["global_batch_size"] = _BATCH if rows >= _NUM_SMALL else _SMALL_BATCH
        width = _ANSWER_WIDTH if finds_answers else _WIDTH
        fitting = min(width, facts.num_positions or width)
        if fitting != _WIDTH:
            given = {"max_length": fitting, **given}
        if not finds_answers and (name == "finetune" or name == "prediction" and has_kept_logits):
            given = {"head_init": "linear_probe", **given}
        given = {"learning_rate": _rate(name, given, facts, is_inherited), **given}
        filled[name] = _stage(name, given, length, rows, bool(share))
        lines.append(_describe(name, filled[name], rows))
    return filled, lines


def fill_update(num_rows: int, hidden_size: int, given: Any) -> tuple[dict[str, Any], str]:
    """(the section update for so many rows and a model of this width, what was chosen).

    Settings that are `given` stay; raises ValueError where these are no section.
    """
    batch = _BATCH if num_rows >= _NUM_SMALL else _SMALL_BATCH
    section = {
        "learning_rate": _FAST if hidden_size <= _WIDE else _SLOW,
        "num_epochs": LENGTHS["finetune"].epochs(num_rows, batch),
        "global_batch_size": batch,
        "batching": "pack",
        "trained_words": "used",
    }
    own = {name: v for name, v in _section("update", given).items() if v is not None}
    if own.get("num_steps"):
        del section["num_epochs"]
    section |= own
    return section, _describe("update", section, num_rows)


def _section(name: str, given: Any) -> dict[str, Any]:
    """A section of the config; empty where it is not given."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: expected a section, got {given!r}; write {name}: {{…}}")
    return dict(given)


def _task(given: dict[str, Any], facts: Facts, lines: list[str]) -> tuple[dict[str, Any], float]:
    """(the section, the share of the labelled rows that chooses)."""
    is_few = facts.num_labelled < _FEW_ROWS
    task = {"select_share": None if is_few else _SELECT_SHARE, **given}
    if not any(task.get(name) for name in ("dev", "dev_share", "builtin")):
        task["dev_share"] = _DEV_SHARE
        lines.append(f"task: {_DEV_SHARE:.0%} of the rows are dev: they only score the models")
    share = task["select_share"]
    if isinstance(share, float) and 0 < share < 1:
        lines.append(f"task: {share:.0%} of the labelled rows choose checkpoints, not dev")
        return task, share
    why = "as there are few" if is_few and "select_share" not in given else "as given"
    lines.append(f"task: no rows are set apart to choose checkpoints, {why}")
    return task, 0.0


def _compute(given: dict[str, Any], facts: Facts, lines: list[str]) -> dict[str, Any]:
    """The section with unrolled layers, and with the dtype that is fastest on the machine."""
    if given.get("unroll_layers") is None:
        given = {**given, "unroll_layers": True}
    if given.get("dtype") is None and facts.fast_dtype != "float32":
        lines.append(f"compute: {facts.fast_dtype}, which this machine computes fastest")
        return {**given, "dtype": facts.fast_dtype}
    return given


def _students(filled: dict[str, Any], facts: Facts, lines: list[str]) -> list[dict[str, Any]]:
    """Fills in the student, or each of the students, and returns their sections."""
    if filled.get("students") is None:
        filled["student"] = _student("student", _section("student", filled.get("student")), facts)
        lines.append(_describe_student("student", filled["student"], facts))
        return [filled["student"]]
    students = {}
    for name, given in _section("students", filled["students"]).items():
        origin = f"students.{name}"
        students[name] = _student(origin, _section(origin, given), facts)
        lines.append(_describe_student(origin, students[name], facts))
    filled["students"] = students
    return list(students.values())


def _student(origin: str, given: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """A student with half the teacher's layers, at the teacher's width or narrower.

    Its layers divide those of the teacher, as the even map of layers wants it, and its heads are
    the teacher's.
    """
    if given.get("path") or given.get("preset"):
        return given
    is_wide = facts.hidden_size > _WIDE
    most = _DEEPEST if is_wide else max(facts.num_layers // 2, 1)
    depth = max(n for n in range(1, most + 1) if facts.num_layers % n == 0)
    width = facts.hidden_size
    if is_wide:
        width = facts.num_heads * max(round(_NARROW / facts.num_heads), 1)
    width = given.get("hidden_size") or width
    is_equal = width == facts.hidden_size
    inner = facts.intermediate_size if is_equal else None
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "intermediate_size": inner or (4 * width if isinstance(width, int) else None),
        "num_attention_heads": facts.num_heads,
        "init": "teacher_layers" if is_equal else "teacher_reduced",
        **{name: value for name, value in given.items() if value is not None},
    }


_STARTS = {
    "teacher_layers": "it starts from the teacher's layers, which are as wide",
    "teacher_reduced": "it starts from the teacher's layers in fewer dimensions",
    "teacher_embeddings": "it starts from the teacher's embeddings",
    "random": "it starts from random weights",
}


def _describe_student(origin: str, student: dict[str, Any], facts: Facts) -> str:
    if student.get("path"):
        return f"{origin}: it starts from the weights of {student['path']}"
    if "init" not in student:
        return f"{origin}: as given"
    if not (sizes := student.get("preset")):
        sizes = f"{student['num_hidden_layers']} layers × {student['hidden_size']}"
    return f"{origin}: {sizes}; {_STARTS.get(student['init'], student['init'])}"


_INHERITED = ("teacher_layers", "teacher_reduced")
# Settings of the section distillation with which a run may keep no logits for a linear probe.
_NOT_KEPT = {"preset", "prediction", "keep_logits"}


def _rate(name: str, given: dict[str, Any], facts: Facts, is_inherited: bool) -> float:
    """The learning rate of a stage; a head that starts at random needs a higher one."""
    if name == "finetune":
        return _FAST if facts.hidden_size <= _WIDE else _SLOW
    if name == "intermediate":
        return 1e-3 if is_inherited else 5e-4
    if name == "prediction" and is_inherited:
        return 5e-5 if given.get("head_init") == "linear_probe" else 2e-4
    return 3e-4


def _stage(
    name: str, given: dict[str, Any], length: Length, num_rows: int, chooses: bool
) -> dict[str, Any]:
    """The section of a stage; where rows choose, a stage with a head is evaluated five times."""
    settings: dict[str, Any] = {"batching": "pack", "trained_words": "used"}
    if given.get("num_steps") is None and given.get("num_epochs") is None:
        settings["num_epochs"] = length.epochs(num_rows, _batch_of(given))
    if name == "intermediate":
        settings["dropout"] = 0.0
    settings |= given
    if name != "intermediate" and "eval_every" not in given:
        steps = _num_steps(settings, num_rows)
        # More steps than there are, also where a row has many windows: only the end is evaluated.
        settings["eval_every"] = max(steps // 5, 1) if chooses else _NEVER * steps
    return settings


def _num_steps(settings: dict[str, Any], num_rows: int) -> int:
    """About how many steps a stage has; 1 for values that no config may have."""
    values = settings.get("num_steps"), settings.get("num_epochs")
    if not all(value is None or _is_finite(value) for value in values):
        return 1
    if values[0]:
        return max(int(values[0]), 1)
    return max(math.ceil((values[1] or 0) * num_rows / _batch_of(settings)), 1)


def _batch_of(settings: dict[str, Any]) -> int:
    """The examples of a batch; 32 for values that no config may have."""
    given = settings["global_batch_size"]
    return int(given) if _is_finite(given) and given >= 1 else _BATCH


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _describe(name: str, settings: dict[str, Any], num_rows: int) -> str:
    length = f"{_num_steps(settings, num_rows):,} steps"
    if epochs := settings.get("num_epochs"):
        length = f"{epochs} epoch{'' if epochs == 1 else 's'} of {num_rows:,} rows, about {length}"
    probe = ", from a linear probe" if settings.get("head_init") == "linear_probe" else ""
    batch = f"{settings['global_batch_size']} examples each"
    return f"{name}: {length} of {batch}{probe}; learning rate {settings['learning_rate']}"
