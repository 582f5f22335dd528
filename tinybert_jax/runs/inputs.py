"""The inputs of a run, as its config names them: read, not yet checked against one another."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tinybert_jax.runs.preflight import naming
from tinybert_jax.config.data import CorpusSection
from tinybert_jax.config.models import FurtherTeacher
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.config.models import Student
from tinybert_jax.config.models import StudentSection
from tinybert_jax.config.models import further_origin
from tinybert_jax.config.models import student_origin
from tinybert_jax.config.run import RunConfig
from tinybert_jax.data.splits import TaskData, corpus_documents, read_task, split_heldout
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.hub import find_folder, load_tokenizer
from tinybert_jax.tokens.store import Store, open_store


class Text(NamedTuple):
    """The corpus: as documents, or as token stores."""

    corpus: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()  # documents of the corpus that no stage trains on
    stores: tuple[tuple[Store, float], ...] = ()  # each with its weight
    heldout_store: Store | None = None


class Inputs(NamedTuple):
    tokenizer: Any
    teacher: ModelConfig
    further_teachers: tuple[FurtherTeacher, ...]
    students: tuple[Student, ...]
    task: TaskData | None
    text: Text


def read_inputs(config: RunConfig, folder: Path) -> Inputs:
    """All that the config names; a tokenizer that the run folder holds already comes from there.

    Raises one ValueError that tells of every input that cannot be read, a line each.
    """
    # Models before the tokenizer: transformers reads config.json too, and fails less clearly.
    members = config.family.items()
    further = tuple(enumerate(config.distillation.further_teachers))
    given, _, *sizes, task, text, _ = _read_all(
        lambda: _read_sizes("teacher", config.teacher.path),
        lambda: _read_sizes("teacher.finetuned", config.teacher.finetuned),
        *(
            functools.partial(_read_sizes, student_origin(name), section.path)
            for name, section in members
        ),
        *(
            functools.partial(_read_sizes, further_origin(number), section.path)
            for number, section in further
        ),
        lambda: read_task(config.task) if config.task else None,
        lambda: _read_text(config.corpus),
        lambda: find_folder(config.tokenizer.path) if config.tokenizer.path else None,
    )
    tokenizer = _make_tokenizer(config, folder, text.corpus)
    teacher = given or _fresh_teacher(config, tokenizer)
    students = tuple(
        Student(name, section, own or _student_sizes(name, section, teacher))
        for (name, section), own in zip(members, sizes[: len(members)], strict=True)
    )
    others = tuple(
        FurtherTeacher(*own, sizes)
        for own, sizes in zip(further, sizes[len(members) :], strict=True)
    )
    return Inputs(tokenizer, teacher, others, students, task, text)


def _read_all(*readers: Callable[[], Any]) -> list[Any]:
    """What each of them reads; raises one ValueError of all that cannot be read, a line each."""
    results, mistakes = [], []
    for read in readers:
        try:
            results.append(read())
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return results


def _read_text(section: CorpusSection | None) -> Text:
    if section is None:
        return Text()
    if not section.stores:
        return Text(*split_heldout(corpus_documents(section), section.heldout_share))
    stores = tuple((open_store(path), share) for path, share in sorted(section.stores.items()))
    heldout = open_store(section.heldout_store) if section.heldout_store else None
    return Text(stores=stores, heldout_store=heldout)


def _make_tokenizer(config: RunConfig, folder: Path, corpus: Sequence[str]) -> Any:
    if (folder / "tokenizer").is_dir():
        return load_tokenizer(folder / "tokenizer")
    section = config.tokenizer
    if section.vocab_size:
        return train_wordpiece(corpus, vocab_size=section.vocab_size, lowercase=section.lowercase)
    folder_of_pieces = section.path or config.teacher.path
    assert folder_of_pieces is not None  # the config has one of the three
    return load_tokenizer(folder_of_pieces)


def _fresh_teacher(config: RunConfig, tokenizer: Any) -> ModelConfig:
    ours = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return _sized({**config.teacher.sizes(), **ours}, "teacher")


def _read_sizes(origin: str, path: str | None) -> ModelConfig | None:
    if path is None:
        return None
    with naming(origin):
        return read_model(path).config


def _student_sizes(name: str, section: StudentSection, teacher: ModelConfig) -> ModelConfig:
    inherited = teacher.model_dump(exclude={"num_hidden_layers", "initializer_range"})
    return _sized({**inherited, **section.sizes()}, student_origin(name))


def _sized(fields: dict[str, Any], origin: str) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{origin}: {error.errors()[0]['msg']}") from None
