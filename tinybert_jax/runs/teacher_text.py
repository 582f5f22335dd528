"""A teacher's translations of the task's sources: made once and kept in the run folder.

Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the student learns what the
teacher writes, found by beam search. The file `teacher_text/<hash>/<row>.json` of the run folder
holds the texts from source number `row` on. The hash covers the sources, the teacher's weights and
sizes, and the search. A killed run resumes after the last complete file.
"""

import functools
import hashlib
import json
from pathlib import Path

from tinybert_jax.config.run import StagePlan
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.parallel import without_blank
from tinybert_jax.huggingface.encoder_decoder import load_encoder_decoder
from tinybert_jax.models.params import sha256
from tinybert_jax.parallel import processes
from tinybert_jax.performance import disk
from tinybert_jax.runs import shared_folder
from tinybert_jax.runs.judges import generated
from tinybert_jax.runs.run import Run

ROWS_PER_FILE = 2**11


def read(run: Run, plan: StagePlan) -> Examples:
    """The sources to train on with the teacher's translations as targets; those without any text
    are left out.

    Makes the texts that no file holds yet. Raises ValueError for a damaged file.
    """
    path, examples = run.task_teacher, run.required_task.data.train
    loaded, num_beams = load_encoder_decoder(path), run.distillation.num_beams
    depends_on = {
        "sources": hashlib.sha256("\n".join(examples.text).encode()).hexdigest(),
        "max_length": plan.section.max_length,
        "num_beams": num_beams,
        "sizes": loaded.config.model_dump(),
        "weights": sha256(loaded.params),
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = run.folder / "teacher_text" / key
    processes.on_main("teacher's text", lambda: disk.make_folder(folder))
    texts: list[str] = []
    for start in range(0, len(examples.text), ROWS_PER_FILE):
        part = examples.take(slice(start, start + ROWS_PER_FILE))
        file = folder / f"{start}.json"
        if not processes.from_main("teacher's text", file.is_file):
            made = generated(
                run, loaded.params, loaded.config, plan.section, part, num_beams=num_beams
            )
            processes.on_main("teacher's text", functools.partial(_save, made, file))
            shared_folder.wait_until(file.is_file, str(file))
            stop, total = start + len(part.text), len(examples.text)
            run.log.say(f"{plan.name}: {path} has translated {stop:,} of {total:,} sources")
        texts += _load(file, len(part.text))
    given, num_blank = without_blank(examples._replace(text_pair=texts))
    if num_blank:
        run.log.say(f"{plan.name}: {num_blank:,} translations without a word are left out")
    return given


def _save(texts: list[str], file: Path) -> None:
    disk.replace_text(file, json.dumps({"texts": texts, "sha256": _hash(texts)}))


def _load(file: Path, number: int) -> list[str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        texts = found["texts"]
        is_whole = len(texts) == number and _hash(texts) == found["sha256"]
    except (ValueError, KeyError, TypeError):
        texts, is_whole = [], False
    if not is_whole:
        raise ValueError(
            f"{file}: expected {number:,} translations as they were written, got others; delete "
            "the file, and the run makes them again"
        )
    return texts


def _hash(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
