"""What has to hold before a run writes anything. Each raises ValueError: expected, got, the fix.

Reads configs and folders; neither trains nor scores, and writes nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tinybert_jax.config import load as configs
from tinybert_jax.config.models import FurtherTeacher
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.config.models import Student
from tinybert_jax.config.objectives import DISTILL_STAGES, AttentionTerm, LayerTerm, model_kind
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import TEACHER_STAGES, StageSection
from tinybert_jax.data.wordpiece import is_continuation
from tinybert_jax.huggingface.folder import check_start, read_model
from tinybert_jax.huggingface.hub import check_same_pieces, check_table
from tinybert_jax.models.attention import missing_device
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.objectives.alignment import check_heads
from tinybert_jax.objectives.alignment import check_same_vocabulary
from tinybert_jax.settings.layer_maps import make_layer_pairs
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.training.optimizer import make_schedule

# The stage that makes the model which a stage starts from or learns from, where the config has it.
_STAGE_BEFORE = {
    "finetune": "pretrain",
    "general": "pretrain",
    "intermediate": "finetune",
    "prediction": "finetune",
}


_MAY_CHANGE = ("distillation.teacher_margin",)  # when a run goes on: no array depends on it


def check_folder(folder: Path, config: RunConfig) -> None:
    """Refuses a run folder that is a file, has foreign files or holds another config's run."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"run_dir: expected a folder, got {folder}, but {path} is a file; choose another"
            )
    file = folder / "config.yaml"
    if not file.is_file():
        foreign = sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))
        if foreign:
            raise ValueError(
                f"run_dir: expected an empty or new folder or one of an earlier run, got {folder} "
                f"with {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}; choose another"
            )
        return
    changes = configs.differences(file, config, ignored=_MAY_CHANGE)
    if changes:
        raise ValueError(
            f"run_dir: {folder} holds a run of another config; choose another run_dir, or undo "
            "these changes:\n  " + "\n  ".join(changes)
        )


def check_order(config: RunConfig, stages: Sequence[str], is_done: Callable[[str], bool]) -> None:
    """Refuses a stage whose teacher the config wants trained first, by a stage not run yet."""
    there = tuple(name for name in DISTILL_STAGES if name in stages or is_done(name))
    for name in stages:
        before = _STAGE_BEFORE.get(name)
        if name in DISTILL_STAGES and not config.reads_teacher(name, there):
            continue
        if before and getattr(config, before) and before not in stages and not is_done(before):
            raise ValueError(
                f"{name}: expected a finished {before} stage in {config.run_dir}, found none; do "
                f"`tinybert {before}` with this config first, or all at once with `tinybert run`"
            )


def check_vocabularies(config: RunConfig, tokenizer: Any, students: Sequence[Student]) -> None:
    """Refuses a given model whose folder has another tokenizer than the run's."""
    if config.teacher.path:
        check_same_pieces(tokenizer, config.teacher.path, "teacher")
    if config.teacher.finetuned:
        check_same_pieces(tokenizer, config.teacher.finetuned, "teacher")
    for student in students:
        if student.section.path:
            with naming(student.origin):
                check_same_pieces(tokenizer, student.section.path, "student")
    masks = [name for name in ("pretrain", "general") if _masks(config, name)]
    if masks and tokenizer.mask_token is None:
        raise ValueError(
            f"{masks[0]}: expected a tokenizer with a mask_token, got one without; set "
            "tokenizer.path to a folder of BERT's kind"
        )
    if config.pretrain and config.pretrain.mask_unit != "token":
        is_continuation(tokenizer)


def _masks(config: RunConfig, stage: str) -> bool:
    is_there = getattr(config, stage) is not None
    return is_there and (stage == "pretrain" or config.distillation.general_mask_rate > 0)


def check_sizes(
    config: RunConfig,
    stages: Sequence[str],
    mesh: Mesh,
    tokenizer: Any,
    teacher: ModelConfig,
    students: Sequence[Student],
) -> None:
    """Word tables, positions, batches, and what distillation asks of a pair of models."""
    for name in stages:
        section = getattr(config, name)
        _check_attention(config, name, teacher, students)
        if name != "baseline":
            _check_model(config, name, "teacher", teacher, tokenizer)
        for student in students if name not in TEACHER_STAGES else ():
            with naming(student.origin):
                _check_model(config, name, "student", student.sizes, tokenizer)
        check_schedule(name, section)
        shards = num_batch_shards(mesh) * section.gradient_accumulation_steps
        for part in section.parts():
            if part.section.global_batch_size % shards:
                raise ValueError(
                    f"{name}.{part.key}global_batch_size: expected a multiple of {shards} (batch "
                    f"devices × accumulation steps), got {part.section.global_batch_size}"
                )
    for student in students if set(DISTILL_STAGES) & set(stages) else ():
        with naming(student.origin):
            _check_pair(config, stages, teacher, student.sizes)
        _check_start(student, teacher)


def _check_model(
    config: RunConfig, stage: str, role: str, model: ModelConfig, tokenizer: Any
) -> None:
    """Refuses a model that has no room for a stage's text."""
    check_table(tokenizer, model, f"the {role}")
    max_length, positions = getattr(config, stage).max_length, model.max_position_embeddings
    if max_length > positions:
        raise ValueError(
            f"{stage}.max_length: expected at most {positions} (the {role}'s positions), got "
            f"{max_length}; set {stage}.max_length={positions} or less"
        )
    if model.type_vocab_size < 2 and _has_second_part(config, stage):
        raise ValueError(
            f"{stage}: expected a {role} with two token types for pairs of texts, got "
            f"type_vocab_size {model.type_vocab_size}; use another model, or no pairs"
        )


def _check_attention(
    config: RunConfig, stage: str, teacher: ModelConfig, students: Sequence[Student]
) -> None:
    """Refuses flash attention that is asked for by name and cannot train the stage's models."""
    backend = config.compute.attention
    if backend in ("auto", "xla"):
        return
    origin, fix = f"compute.attention {backend}", "or set compute.attention=auto"
    missing = missing_device(backend)
    if missing:
        raise ValueError(f"{origin}: expected {missing}; run it there, {fix}")
    trained = [teacher] if stage in TEACHER_STAGES else [student.sizes for student in students]
    rates = [model.attention_probs_dropout_prob for model in trained]
    own = getattr(config, stage).dropout
    rate = max(rates) if own is None else own
    if rate:
        raise ValueError(
            f"{origin}: expected no dropout of attention, got {rate} in {stage}; set "
            f"{stage}.dropout=0, {fix}"
        )


def _has_second_part(config: RunConfig, stage: str) -> bool:
    """Whether the rows of a stage are pairs of texts."""
    if stage == "pretrain":
        return config.pretrain is not None and config.pretrain.pair_weight > 0
    return stage != "general" and config.task is not None and config.task.text_pair is not None


def check_schedule(stage: str, section: StageSection) -> None:
    """Refuses schedule settings that do not fit together, as the stage itself would, but now."""
    try:
        make_schedule(
            section.schedule,
            learning_rate=section.learning_rate,
            num_steps=1000,
            warmup_steps=round(section.warmup * 1000),
            end_factor=section.end_factor,
            decay_steps=round(section.decay * 1000),
            power=section.power,
        )
    except ValueError as error:
        raise ValueError(f"{stage}.schedule {section.schedule}, for 1000 steps: {error}") from None


def check_weights(
    config: RunConfig,
    stages: Sequence[str],
    teacher: ModelConfig,
    students: Sequence[Student],
    num_outputs: int,
) -> None:
    """Reads every given folder as the stages will, so that none fails in the middle of a run."""
    if config.teacher.finetuned:
        _check_same_sizes(config.teacher.finetuned, teacher)
    make = {
        "encoder": make_encoder,
        "pretrained": lambda model: make_masked_lm(
            model, pair_head=bool(config.pretrain and config.pretrain.pair_weight)
        ),
        "masked_lm": make_masked_lm,
        "classifier": lambda model: make_classifier(model, num_outputs),
    }
    starts = [("teacher", teacher, *start) for start in _teacher_starts(config, stages)]
    starts += [
        (student.origin, student.sizes, student.section.path, kind, False)
        for student in students
        if student.section.path
        for kind in _student_kinds(config, stages)
    ]
    for origin, model, path, kind, whole in starts:
        with naming(origin):
            _, init = make[kind](model)
            check_start(path, init, whole=whole)


def check_further_teachers(
    config: RunConfig,
    tokenizer: Any,
    teachers: Sequence[FurtherTeacher],
    num_outputs: int,
    label_names: Sequence[str] | None,
) -> None:
    """Refuses those that cannot say of the task's text what the teacher says."""
    for own in teachers:
        path = own.section.path
        with naming(own.origin):
            check_same_pieces(tokenizer, path, "teacher")
            _check_model(config, "prediction", "teacher", own.sizes, tokenizer)
            check_labels(path, label_names)
            _, init = make_classifier(own.sizes, num_outputs)
            check_start(path, init, whole=True)


def check_labels(path: str | Path, label_names: Sequence[str] | None) -> None:
    """Refuses a teacher whose labels, or their order, are not the task's."""
    theirs = read_model(path).label_names
    if label_names is None or theirs is None or all(n.startswith("LABEL_") for n in theirs):
        if label_names is not None and theirs is not None and len(theirs) != len(label_names):
            raise ValueError(
                f"labels: expected {len(label_names)} ({list(label_names)}), the teacher {path} "
                f"has {len(theirs)}; fine-tune it on this task first (finetune section)"
            )
        return
    if tuple(theirs) != tuple(label_names):
        raise ValueError(
            f"labels: expected the teacher's order {list(theirs)}, got the task's "
            f"{list(label_names)}; write task.labels in the teacher's order, or fine-tune the "
            f"teacher on this task first (finetune section)"
        )


def _check_pair(
    config: RunConfig, stages: Sequence[str], teacher: ModelConfig, student: ModelConfig
) -> None:
    """Refuses a pair of models that a term cannot compare."""
    terms = [
        (stage, term)
        for stage in DISTILL_STAGES
        if stage in stages
        for term in config.distillation.terms(stage)
    ]
    check_same_vocabulary(student, teacher)
    for stage, term in terms:
        origin = f"distillation.{stage}, term {term.term}"
        with naming(origin):
            if isinstance(term, AttentionTerm) and not term.heads:
                check_heads(student, teacher, term.head_map)
            if isinstance(term, LayerTerm):
                depths = student.num_hidden_layers, teacher.num_hidden_layers
                with naming("layer_map"):
                    make_layer_pairs(term.layer_map, *depths)
        for role, model in (("student", student), ("teacher", teacher)):
            heads = getattr(term, "heads", None)
            if heads and model.hidden_size % heads:
                raise ValueError(
                    f"{origin}: expected heads that divide the {role}'s hidden_size "
                    f"{model.hidden_size}, got {heads}; choose a divisor of both widths"
                )
        if term.term in ("cls", "cosine") and student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"{origin}: expected a student as wide as its teacher, got hidden_size "
                f"{student.hidden_size} and {teacher.hidden_size}; use the term hidden, which has "
                "a projection"
            )


def _check_start(student: Student, teacher: ModelConfig) -> None:
    """Refuses a student that cannot start from its teacher's weights as it is to."""
    init = student.section.init
    if init == "random":
        return
    copies = init == "teacher_layers"
    is_equal = {"max_position_embeddings": False, "hidden_size": copies}
    if copies:
        is_equal |= {"num_attention_heads": True, "intermediate_size": True}
    for name, equal in is_equal.items():
        theirs, got = getattr(teacher, name), getattr(student.sizes, name)
        if got > theirs or (equal and got != theirs):
            raise ValueError(
                f"{student.origin}.{name}: expected {'' if equal else 'at most '}{theirs} (the "
                f"teacher's), got {got}, because {student.origin}.init is {init}; set it to that, "
                f"or {student.origin}.init=random"
            )
    if copies:
        with naming(f"{student.origin}.init_layers"):
            make_layer_pairs(
                student.section.init_layers,
                student.sizes.num_hidden_layers,
                teacher.num_hidden_layers,
            )


@contextlib.contextmanager
def naming(origin: str) -> Iterator[None]:
    """Puts what is checked before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _teacher_starts(config: RunConfig, stages: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Given folders that the stages read: path, what they make of it, if all has to be there."""
    chosen, teacher = set(stages), config.teacher
    if teacher.path and "pretrain" in chosen:
        yield teacher.path, "pretrained", False
    elif teacher.path and "finetune" in chosen and not config.pretrain:
        yield teacher.path, "classifier", False
    if teacher.path and not config.pretrain and "general" in chosen:
        if config.teaches("general"):
            kind = model_kind(config.distillation.terms("general"), of_teacher=True)
            yield teacher.path, kind, True
        elif config.reads_teacher("general"):
            yield teacher.path, "encoder", True
    given, on_task = teacher.finetuned or teacher.path, chosen & {"intermediate", "prediction"}
    if given and not config.finetune:
        if any(config.teaches(name) for name in on_task):
            yield given, "classifier", True
        elif any(config.reads_teacher(name) for name in on_task):
            yield given, "encoder", True


def _student_kinds(config: RunConfig, stages: Sequence[str]) -> Iterator[str]:
    """What the stages make of a student's folder."""
    first = next((name for name in DISTILL_STAGES if name in stages), None)
    if first == "prediction" or "baseline" in stages:
        yield "classifier"
    if first in ("general", "intermediate"):
        yield model_kind(config.distillation.terms(first))


def _check_same_sizes(path: str, teacher: ModelConfig) -> None:
    """Of all that changes what the weights compute."""
    free = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"}
    expected = teacher.model_dump(exclude=free | {"pad_token_id"})
    got = read_model(path).config.model_dump()
    different = [name for name in expected if got[name] != expected[name]]
    if different:
        raise ValueError(
            f"teacher.finetuned: expected the teacher's "
            f"{', '.join(f'{name} {expected[name]}' for name in different)}, got "
            f"{', '.join(f'{name} {got[name]}' for name in different)} in {path}; give "
            "teacher.path and teacher.finetuned of one model"
        )
