"""Reads the inputs of a run: models, tokenizer, task and corpus.

`runs.checks` and `runs.corpus_checks` check that the inputs fit together.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tinybert_jax.config.data import CorpusSection, TokenizerSection
from tinybert_jax.config.models import (
    FurtherTeacher,
    FurtherTeacherSection,
    ModelSection,
    Student,
    StudentSection,
    TeacherSection,
    further_origin,
    student_origin,
)
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data.errors import prefix_errors
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import TaskData, corpus_documents, read_task, split_heldout
from tinybert_jax.data.wordpiece import plain_backend, train_wordpiece
from tinybert_jax.huggingface.encoder_decoder import (
    Tokenizers,
    is_encoder_decoder,
    load_encoder_decoder,
    load_tokenizers,
)
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.huggingface.hub import find_folder
from tinybert_jax.models.families import DEFAULT, family_of
from tinybert_jax.settings.sizes import EncoderDecoderConfig, ModelConfig, Sizes
from tinybert_jax.tasks.table import TASKS
from tinybert_jax.tokens.store import Store, open_store


class Corpus(NamedTuple):
    """Text without labels: documents, or token stores."""

    documents: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()  # documents that no stage trains on
    stores: tuple[tuple[Store, float], ...] = ()  # (store, share of the rows of a batch)
    heldout_store: Store | None = None


class Inputs(NamedTuple):
    tokenizers: Tokenizers
    teacher: Sizes
    further_teachers: tuple[FurtherTeacher, ...]
    students: tuple[Student, ...]
    task: TaskData | None
    corpus: Corpus


def read_inputs(
    *,
    teacher: TeacherSection,
    further: Sequence[FurtherTeacherSection],
    students: Mapping[str, StudentSection],
    tokenizer: TokenizerSection,
    corpus: CorpusSection | None,
    task: TaskSection | None,
    kept_tokenizer: Path,
) -> Inputs:
    """Reads the models, the tokenizer, the task and the corpus that the sections name.

    Where the folder `kept_tokenizer` exists, the tokenizer is read from it. Raises one ValueError
    with one line for every input that cannot be read.
    """
    translates = task is not None and TASKS[task.kind].generates
    # Models before the tokenizer: transformers reads config.json too, with a less clear error.
    given, _, *sizes, examples, text, _, _ = _read_all(
        lambda: _read_sizes("teacher", teacher.path, translates),
        lambda: _read_sizes("teacher.finetuned", teacher.finetuned, translates),
        *(
            functools.partial(_read_sizes, student_origin(name), section.path, translates)
            for name, section in students.items()
        ),
        *(
            functools.partial(_read_sizes, further_origin(number), section.path, translates)
            for number, section in enumerate(further)
        ),
        lambda: read_task(task, TASKS[task.kind].read) if task else None,
        lambda: _read_corpus(corpus),
        *(
            functools.partial(_find_tokenizer, f"tokenizer.{name}", path)
            for name, path in (("path", tokenizer.path), ("target_path", tokenizer.target_path))
        ),
    )
    pairs = examples.train if translates and examples is not None else None
    pieces = _make_tokenizers(tokenizer, teacher.path, kept_tokenizer, text.documents, pairs)
    if pairs is not None:
        _tell_unknown(pieces, pairs)
    teacher_sizes = given or _new_teacher(teacher, pieces, translates)
    named = tuple(
        Student(name, section, read or _student_sizes(name, section, teacher_sizes))
        for (name, section), read in zip(students.items(), sizes[: len(students)], strict=True)
    )
    others = tuple(
        FurtherTeacher(number, section, read)
        for (number, section), read in zip(enumerate(further), sizes[len(students) :], strict=True)
    )
    return Inputs(pieces, teacher_sizes, others, named, examples, text)


def _read_all(*readers: Callable[[], Any]) -> list[Any]:
    """The results of all readers; raises one ValueError with a line for every reader that fails."""
    results, errors = [], []
    for read in readers:
        try:
            results.append(read())
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return results


def _read_corpus(section: CorpusSection | None) -> Corpus:
    if section is None:
        return Corpus()
    if not section.stores:
        return Corpus(*split_heldout(corpus_documents(section), section.heldout_share))
    stores = tuple((open_store(path), share) for path, share in sorted(section.stores.items()))
    heldout = open_store(section.heldout_store) if section.heldout_store else None
    return Corpus(stores=stores, heldout_store=heldout)


def _make_tokenizers(
    section: TokenizerSection,
    teacher: str | None,
    kept: Path,
    documents: Sequence[str],
    pairs: Examples | None,
) -> Tokenizers:
    """`documents`: of the corpus; `pairs`: those to train a translation on."""
    if kept.is_dir():
        return load_tokenizers(kept)
    sources, targets = (pairs.text, pairs.text_pair or []) if pairs else ([], [])

    def train(name: str, text: Sequence[str], vocab_size: int) -> Any:
        with prefix_errors(f"tokenizer.{name}"):
            return train_wordpiece(text, vocab_size=vocab_size, lowercase=section.lowercase)

    if section.vocab_size:
        has_own = section.target_path or section.target_vocab_size
        of_pairs = sources if has_own else [*sources, *targets]  # one vocabulary of both languages
        source = train("vocab_size", documents or of_pairs, section.vocab_size)
        tokenizers = Tokenizers(source, source)
    else:
        folder = section.path or teacher
        assert folder is not None  # the config check requires vocab_size, path or a teacher folder
        tokenizers = load_tokenizers(folder)
    if section.target_vocab_size:
        target = train("target_vocab_size", targets, section.target_vocab_size)
        return tokenizers._replace(target=target)
    if section.target_path:
        return tokenizers._replace(target=load_tokenizers(section.target_path).target)
    return tokenizers


def _tell_unknown(tokenizers: Tokenizers, pairs: Examples) -> None:
    """Prints how many texts have characters that the vocabulary of their side lacks."""
    sides = (
        ("sources", tokenizers.source, pairs.text),
        ("targets", tokenizers.target, pairs.text_pair),
    )
    for name, tokenizer, texts in sides:
        rows = plain_backend(tokenizer).encode_batch(list(texts or []))
        count = sum(tokenizer.unk_token_id in row.ids for row in rows)
        if count:
            print(
                f"task.train: {count:,} of {len(rows):,} {name} have characters that the "
                f"vocabulary of {len(tokenizer):,} pieces lacks; they are read as [UNK]",
                flush=True,
            )


def _find_tokenizer(origin: str, path: str | None) -> None:
    with prefix_errors(origin):
        if path:
            find_folder(path)


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """What a model of its text takes from a tokenizer."""
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}


def _new_teacher(section: TeacherSection, tokenizers: Tokenizers, translates: bool) -> Sizes:
    with prefix_errors("teacher"):
        fixed = family_of(section.model_type).fixed
    sizes = {**fixed, **section.sizes(), **_vocabulary(tokenizers.source)}
    encoder = _make_config(sizes, "teacher")
    if not translates:
        return encoder
    target = tokenizers.target
    ids = {"decoder_start_token_id": "cls", "eos_token_id": "sep", "pad_token_id": "pad"}
    special = {name: getattr(target, f"{token}_token_id") for name, token in ids.items()}
    return _with_decoder(section, encoder, _vocabulary(target), special, "teacher")


def _with_decoder(
    section: ModelSection,
    encoder: ModelConfig,
    vocabulary: Mapping[str, int],
    ids: Mapping[str, int],
    origin: str,
) -> EncoderDecoderConfig:
    """An encoder with a decoder of its sizes, but for the number of layers and the vocabulary."""
    layers = section.num_decoder_layers or encoder.num_hidden_layers
    if encoder.model_type is not None:
        raise ValueError(
            f"{origin}.model_type: expected {DEFAULT} for translation, got {encoder.model_type}; "
            "remove it"
        )
    decoder = encoder.model_copy(update={"num_hidden_layers": layers, **vocabulary})
    return EncoderDecoderConfig(encoder=encoder, decoder=decoder, **ids)


def _read_sizes(origin: str, path: str | None, translates: bool) -> Sizes | None:
    if path is None:
        return None
    with prefix_errors(origin):
        is_joined = is_encoder_decoder(path)
        if is_joined == translates:
            return load_encoder_decoder(path).config if is_joined else read_model(path).config
        if is_joined:
            raise ValueError(
                f"expected a folder of an encoder, got {path}, an encoder-decoder; use another "
                "folder, or task.kind=translation"
            )
        read_model(path)  # says what else is wrong with the folder
        raise ValueError(
            f"expected a folder of an encoder-decoder for translation, got {path}, an encoder; "
            "give sizes, or join two encoders by from_encoder_decoder_pretrained of "
            "TinyBertForConditionalGeneration and give what it saves"
        )


def _student_sizes(name: str, section: StudentSection, teacher: Sizes) -> Sizes:
    origin = student_origin(name)
    encoder = teacher.encoder if isinstance(teacher, EncoderDecoderConfig) else teacher
    inherited = encoder.model_dump(exclude={"num_hidden_layers", "initializer_range"})
    given = section.sizes()
    with prefix_errors(origin):
        family = family_of(given.get("model_type", encoder.model_type))
    if family is not family_of(encoder.model_type):
        inherited |= family.fixed
    sizes = _make_config({**inherited, **given}, origin)
    if not isinstance(teacher, EncoderDecoderConfig):
        return sizes
    ids = teacher.model_dump(exclude={"encoder", "decoder"})
    vocabulary = teacher.decoder.model_dump(include={"vocab_size", "pad_token_id"})
    return _with_decoder(section, sizes, vocabulary, ids, origin)


def _make_config(fields: dict[str, Any], origin: str) -> ModelConfig:
    if fields.get("model_type") == DEFAULT:
        fields = {**fields, "model_type": None}  # as `read_model` leaves it for a BERT folder
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{origin}: {error.errors()[0]['msg']}") from None
