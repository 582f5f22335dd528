"""`tinybert_jax.distill`: the run of `tinybert run --data`, from Python."""

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinybert_jax.config import load as config_files
from tinybert_jax.inference.pipeline import Pipeline
from tinybert_jax.inference.predict import Model
from tinybert_jax.recipes import by_rows, from_table
from tinybert_jax.recipes import pipeline as recipe
from tinybert_jax.settings.sizes import PRESETS
from tinybert_jax.training import preemption

_CALL = "tinybert_jax.distill"
_SIZES = re.compile(r"(\d+)l-(\d+)d")


class Result:
    """A finished run."""

    def __init__(self, folder: Path):
        self.folder = folder  # of the run
        self.model = folder / "hf"  # the student, as a Hugging Face folder
        self.report = folder / "report.html"

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    @property
    def scores(self) -> dict[str, float]:
        """The score of each model on the dev rows, by the metric of the task."""
        metric = self.results["metric"]
        return {
            f"{model['role']} {model['name']}": model["metrics"][metric]
            for model in self.results["models"]
        }

    def pipeline(self) -> Pipeline:
        """The student, to be called with texts."""
        return Pipeline(Model(str(self.model)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the student to a new folder; raises ValueError for one that exists."""
        if Path(folder).exists():
            raise ValueError(f"expected a new folder, got {folder}, which exists; remove it")
        shutil.copytree(self.model, folder)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
        return f"Result({str(self.folder)!r}: {self.results['metric']} {shown})"


def distill(
    data: str | Path,
    teacher: str | Path,
    student: str | Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Fine-tunes a teacher on a table of labelled text and distils it, as `tinybert run --data`.

    `data`: a .csv, .tsv or .jsonl file. `teacher`: a BERT folder or hub id. `student`: layers and
    width as "3l-384d", the name of a preset, or settings of the section student; None: the recipe
    chooses. `task`: the kind of the task; what is None is guessed from the columns. `settings`: by
    path, such as {"finetune.num_epochs": 3}. In the main thread, and where the
    program has no handler of its own, Ctrl-C saves, says so and raises KeyboardInterrupt; the same
    call goes on. Raises ValueError, before anything is written,
    for a wrong input.
    """
    overrides = [_override(name, value) for name, value in (settings or {}).items()]
    if student is not None:
        overrides.append(_override("student", _student(student)))
    if run_dir is not None:
        overrides.append(_override("run_dir", str(run_dir)))
    tree = from_table.make_tree(
        data=str(data),
        teacher=str(teacher),
        text=text,
        text_pair=text_pair,
        label=label,
        task=task,
        overrides=overrides,
        say=print,
    )
    config = config_files.complete(tree, "distill", by_rows.measure, print)
    with preemption.interruptible(_CALL) as stop:
        return Result(recipe.main(config, command=_CALL, stop=stop))


def _override(name: str, value: Any) -> str:
    try:
        # YAML reads the two halves of an escaped character beyond U+FFFF as two characters.
        return f"{name}={json.dumps(value, ensure_ascii=False)}"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings: expected text, numbers, lists or mappings of them for {name}, got "
            f"{value!r} ({error}); write it so, a path as str(path)"
        ) from None


def _student(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given
    sizes = _SIZES.fullmatch(given)
    if not sizes and given not in PRESETS:
        raise ValueError(
            f"student: expected layers and width, as '3l-384d', the name of a preset "
            f"({', '.join(PRESETS)}), or settings as a mapping, got '{given}'"
        )
    if not sizes:
        return {"preset": given}
    return {"num_hidden_layers": int(sizes[1]), "hidden_size": int(sizes[2])}
