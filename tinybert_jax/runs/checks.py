"""Checks of a run's models, before the run writes anything.

A check reads settings and model folders. It raises ValueError with the expected value, the value
found and the fix. It does not run a model and writes nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tinybert_jax.config.models import Student
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import FINETUNE, PRETRAIN, StageSection
from tinybert_jax.data.errors import prefix_errors
from tinybert_jax.data.wordpiece import is_continuation
from tinybert_jax.huggingface import encoder_decoder
from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.folder import check_start, has_pooler, read_model
from tinybert_jax.huggingface.head import is_unnamed
from tinybert_jax.models.attention import MOST_DIMS, missing_device
from tinybert_jax.models.families import DEFAULT
from tinybert_jax.models.heads import Model, make_encoder, make_masked_lm
from tinybert_jax.objectives.alignment import check_same_vocabulary
from tinybert_jax.parallel.mesh import num_batch_shards
from tinybert_jax.runs.run import Run, RunTask, make_task_model
from tinybert_jax.settings.layer_maps import make_layer_pairs
from tinybert_jax.settings.sizes import EncoderDecoderConfig, Side, Sizes, depths, side_of
from tinybert_jax.tasks.table import task_of
from tinybert_jax.terms.table import reads_of
from tinybert_jax.terms.term import Reads
from tinybert_jax.training.optimizer import schedule_of


def check_lengths(run: Run, plans: Sequence[StagePlan]) -> None:
    """Raises ValueError for an example longer than a model's positions, if it cannot be cut."""
    if run.task is None or run.task.kind.check_lengths is None:
        return
    if all(plan.stage.reads_corpus for plan in plans):
        return
    models = [run.teacher, *(student.sizes for student in run.students)]
    positions = min(model.max_position_embeddings for model in models)
    data = run.task.data
    splits = {"train": data.train, "dev": data.dev}
    if data.select is not None:
        splits["train (select_share)"] = data.select
    for split, examples in splits.items():
        with prefix_errors(f"task.{split}"):
            run.task.kind.check_lengths(run.tokenizer, examples, positions)


def check_vocabularies(run: Run) -> None:
    """Raises ValueError for a model folder whose tokenizer is not the run's tokenizer."""
    for path in (run.teacher_section.path, run.teacher_section.finetuned):
        if path:
            encoder_decoder.check_tokenizers(run.tokenizers, path, "teacher")
    for student in run.students:
        if student.section.path:
            with prefix_errors(student.origin):
                encoder_decoder.check_tokenizers(run.tokenizers, student.section.path, "student")
    masked = [plan for plan in run.plans.values() if plan.masking]
    if masked and run.tokenizer.mask_token is None:
        raise ValueError(
            f"{masked[0].name}: expected a tokenizer with a mask_token, got one without; set "
            "tokenizer.path to the folder of a BERT tokenizer"
        )
    if any(plan.masking and plan.masking.unit != "token" for plan in masked):
        is_continuation(run.tokenizer)  # raises for a tokenizer that is not WordPiece


def check_sizes(run: Run, plans: Sequence[StagePlan]) -> None:
    """Checks vocabulary sizes, lengths, batch sizes and the sizes that distillation compares."""
    for plan in plans:
        _check_attention(run, plan)
        if plan.stage.role == "teacher" or plan.stage.distils:
            _check_model(run, plan, "teacher", run.teacher)
        for student in run.students if plan.stage.role == "student" else ():
            with prefix_errors(student.origin):
                _check_model(run, plan, "student", student.sizes)
        check_schedule(plan.name, plan.section)
        shards = num_batch_shards(run.mesh) * plan.section.gradient_accumulation_steps
        for part in plan.section.parts():
            if part.section.global_batch_size % shards:
                raise ValueError(
                    f"{plan.name}.{part.key}global_batch_size: expected a multiple of {shards} "
                    f"(batch devices × accumulation steps), got {part.section.global_batch_size}; "
                    f"set it to {shards * max(1, round(part.section.global_batch_size / shards))}"
                )
    distilling = [plan for plan in plans if plan.stage.distils]
    for student in run.students if distilling else ():
        with prefix_errors(student.origin):
            _check_pair(distilling, run.teacher, student.sizes)
        _check_start(student, run.teacher)


def _check_model(run: Run, plan: StagePlan, role: str, model: Sizes) -> None:
    """Raises ValueError for a model that cannot read the text of a stage."""
    encoder_decoder.check_tables(run.tokenizers, model, f"the {role}")
    stage, positions = plan.name, model.max_position_embeddings
    max_length = plan.section.max_length
    if max_length > positions:
        raise ValueError(
            f"{stage}.max_length: expected at most {positions} (the {role}'s positions), got "
            f"{max_length}; set {stage}.max_length={positions} or less"
        )
    widths = getattr(run.task.section, "widths", ()) if run.task else ()
    if any(width >= model.hidden_size for width in widths):
        raise ValueError(
            f"task.widths: expected widths below the {role}'s hidden_size {model.hidden_size}, got "
            f"{list(widths)}; remove the others"
        )
    pair_weight = plan.masking.pair_weight if plan.masking else 0
    if pair_weight > 0 and format_of(model.model_type).pair_head is None:
        raise ValueError(
            f"{stage}.pair_weight: expected 0, because a {role} of the family {model.model_type} "
            f"has no head for pairs, got {pair_weight}; set {stage}.pair_weight=0, or use the "
            "family bert"
        )
    if model.type_vocab_size == 1 and _reads_pairs(run, plan):
        raise ValueError(
            f"{stage}: expected a {role} with two token types for pairs of texts, got "
            f"type_vocab_size {model.type_vocab_size}; use another model, or no pairs"
        )


def _reads_pairs(run: Run, plan: StagePlan) -> bool:
    """Whether a row of the stage holds two texts."""
    if plan.stage.reads_corpus:
        return plan.masking is not None and plan.masking.pair_weight > 0
    if run.task is None or run.task.kind.unit == "text":
        return False
    return run.task.data.train.text_pair is not None


def _check_attention(run: Run, plan: StagePlan) -> None:
    """Raises ValueError where `compute.attention` names a backend that cannot train the models."""
    backend, stage = run.compute.attention, plan.name
    if backend in ("auto", "xla"):
        return
    origin, fix = f"compute.attention {backend}", "or set compute.attention=auto"
    trained = [run.teacher]
    if plan.stage.role == "student":
        trained = [student.sizes for student in run.students]
    dims = max(model.hidden_size // model.num_attention_heads for model in trained)
    if dims > MOST_DIMS.get(backend, dims):
        raise ValueError(
            f"{origin}: expected heads of at most {MOST_DIMS[backend]} dims, got {dims} in {stage}"
            f"; give the model more heads, {fix}"
        )
    with jax.set_mesh(run.mesh):
        missing = missing_device(backend)
    if missing:
        raise ValueError(f"{origin}: expected {missing}; run it there, {fix}")
    rates = [model.attention_probs_dropout_prob for model in trained]
    rate = max(rates) if plan.section.dropout is None else plan.section.dropout
    if rate and backend != "triton":
        raise ValueError(
            f"{origin}: expected no dropout of attention, got {rate} in {stage}; set "
            f"{stage}.dropout=0, {fix}"
        )


def check_schedule(stage: str, section: StageSection) -> None:
    """Raises ValueError for schedule settings that do not fit together, before the stage starts."""
    try:
        schedule_of(section, num_steps=1000)
    except ValueError as error:
        raise ValueError(f"{stage}.schedule {section.schedule}, for 1000 steps: {error}") from None


def check_weights(run: Run, plans: Sequence[StagePlan]) -> None:
    """Reads every given model folder as the stages will; raises ValueError for a wrong folder."""
    if run.teacher_section.finetuned:
        _check_same_sizes(run.teacher_section.finetuned, run.teacher)
    starts = [("teacher", run.teacher, *start) for start in _teacher_starts(run, plans)]
    starts += [
        (student.origin, student.sizes, student.section.path, make, False)
        for student in run.students
        if student.section.path
        for make in _student_models(run, plans)
    ]
    for origin, model, path, make, whole in starts:
        with prefix_errors(origin):
            if isinstance(model, EncoderDecoderConfig) != encoder_decoder.is_encoder_decoder(path):
                raise ValueError(_other_kind(path, model))
            if isinstance(model, EncoderDecoderConfig):
                continue  # whole, or refused where its sizes were read
            check_start(path, make(model).init, whole=whole)


def _other_kind(path: str, model: Sizes) -> str:
    kinds = ["an encoder", "an encoder-decoder (task.kind translation)"]
    wanted, got = reversed(kinds) if isinstance(model, EncoderDecoderConfig) else kinds
    return f"expected a folder of {wanted}, got {path}, {got}; use another folder, or another kind"


MakeModel = Callable[[Sizes], Model]  # (sizes) -> (apply, init)


def make_model_factory(run: Run, reads: Reads, **options: Any) -> MakeModel:
    """make_model(sizes): the model with the outputs in `reads`; an encoder-decoder has all."""
    if run.task is not None and run.task.kind.generates:
        return lambda sizes: make_task_model(run, sizes, **options)
    if reads.words:
        return lambda sizes: make_masked_lm(side_of(sizes, "encoder"), **options)
    if reads.task_logits:
        return lambda sizes: make_task_model(run, sizes, **options)
    return lambda sizes: make_encoder(side_of(sizes, "encoder"), **options)


def starts_students(run: Run, plan: StagePlan, plans: Sequence[StagePlan]) -> bool:
    """Whether `plan` is the first distillation stage and students start from teacher weights."""
    first = next((other for other in plans if other.stage.distils), None)
    return plan is first and any(student.section.init != "random" for student in run.students)


def _teacher_starts(run: Run, plans: Sequence[StagePlan]) -> Iterator[tuple[str, MakeModel, bool]]:
    """(folder, model that a stage builds, whether the folder needs all its weights) per teacher."""
    section, in_config = run.teacher_section, {plan.stage.name for plan in run.plans.values()}
    names = {plan.name for plan in plans}
    task_head = make_model_factory(run, Reads(task_logits=True))
    trains_words, trains_task = PRETRAIN.name in in_config, FINETUNE.name in in_config
    if section.path and PRETRAIN.name in names:
        pair_head = run.plans[PRETRAIN.name].section.pair_weight > 0
        yield section.path, make_model_factory(run, Reads(words=True), pair_head=pair_head), False
    elif section.path and FINETUNE.name in names and not trains_words:
        yield section.path, task_head, False
    for plan in (plan for plan in plans if plan.stage.teacher == "pretrained"):
        if section.path and not trains_words and plan.reads_teacher:
            yield section.path, make_model_factory(run, reads_of(plan.terms, of_teacher=True)), True
        elif section.path and not trains_words and starts_students(run, plan, plans):
            yield section.path, make_model_factory(run, Reads(encoder=True)), True
    given = section.finetuned or section.path
    if given and not trains_task:
        on_task = [plan for plan in plans if plan.stage.teacher == "task"]
        if any(plan.reads_teacher for plan in on_task):
            yield given, task_head, True
        elif any(starts_students(run, plan, plans) for plan in on_task):
            yield given, make_model_factory(run, Reads(encoder=True)), True


def _student_models(run: Run, plans: Sequence[StagePlan]) -> Iterator[MakeModel]:
    """The models that the stages build from a student's folder."""
    first = next((plan for plan in plans if plan.stage.distils), None)
    starts_with_head = first is not None and first.stage.trains_head
    if starts_with_head or any(p.stage.role == "student" and not p.stage.distils for p in plans):
        yield make_model_factory(run, Reads(task_logits=True))
    if first is not None and not starts_with_head:
        yield make_model_factory(run, reads_of(first.terms))


def check_further_teachers(run: Run) -> None:
    """Raises ValueError for a further teacher with another task, labels or vocabulary."""
    plan = next(plan for plan in run.plans.values() if plan.keeps_logits)
    for teacher in run.further_teachers:
        path = teacher.section.path
        with prefix_errors(teacher.origin):
            encoder_decoder.check_tokenizers(run.tokenizers, path, "teacher")
            _check_model(run, plan, "teacher", teacher.sizes)
            check_teacher_labels(path, run.required_task)
            check_start(path, make_task_model(run, teacher.sizes).init, whole=True)


def check_teacher_labels(path: str | Path, task: RunTask) -> None:
    """Raises ValueError for a teacher with another kind of task, other labels or another order."""
    model, label_names = read_model(path), task.data.label_names
    if task.kind.check_folder is not None:
        task.kind.check_folder(model.folder)
    kind = task_of(model).kind if model.head else task.kind.kind
    if kind != task.kind.kind:
        raise ValueError(
            f"teacher: expected a model of the task's kind, {task.kind.kind}, got {path}, whose "
            f"head is for {kind}; fine-tune it on this task first (finetune section)"
        )
    trained = model.label_names
    if label_names is None or trained is None or is_unnamed(trained):
        if label_names is not None and trained is not None and len(trained) != len(label_names):
            raise ValueError(
                f"labels: expected {len(label_names)} ({list(label_names)}), got {len(trained)} in "
                f"the teacher {path}; fine-tune it on this task first (finetune section)"
            )
        return
    if tuple(trained) != tuple(label_names):
        raise ValueError(
            f"labels: expected the teacher's order {list(trained)} (of {path}), got "
            f"{list(label_names)} from {task.section.train or 'the built-in data'}; write "
            "task.labels in the teacher's order, or fine-tune the teacher on this task first "
            "(finetune section); where a file has changed since a run began, put it back"
        )


def check_old_labels(path: str | None, label_names: Sequence[str] | None) -> None:
    """Raises ValueError where the task's labels do not begin with those of the old model."""
    assert path is not None and label_names is not None  # the config check requires both
    head = read_model(path).head
    if head is None:
        raise ValueError(
            f"student.path: expected a model with a head for the task, got {path} without; "
            "fine-tune it first (tinybert finetune)"
        )
    names = head.label_names
    if tuple(label_names[: len(names)]) != names:
        raise ValueError(
            f"task.labels: expected those of {path} first, in its order {list(names)}, got "
            f"{list(label_names[: len(names)])}; write them so, and new labels after them"
        )


def _check_pair(plans: Sequence[StagePlan], teacher: Sizes, student: Sizes) -> None:
    """Raises ValueError for two models whose outputs a term cannot compare."""
    check_same_vocabulary(student, teacher)
    for plan in plans:
        for term in plan.terms:
            with prefix_errors(f"distillation.{plan.name}, term {term.name}"):
                term.check_fit(student, teacher)


def check_poolers(run: Run, plans: Sequence[StagePlan]) -> None:
    """Refuses a term that reads a pooler, where a model has none or would not keep it."""
    for plan in (plan for plan in plans if plan.stage.distils and reads_of(plan.terms).pooled):
        name = next(term.name for term in plan.terms if term.reads.pooled)
        origin, fix = f"distillation.{plan.name}, term {name}", "use the term cls"
        is_of_task = plan.stage.teacher == "task"
        if is_of_task and run.required_task.kind.unit != "row":
            raise ValueError(
                f"{origin}: expected a task of whole texts, got {run.required_task.kind.kind}, "
                f"whose models have no pooler; {fix}"
            )
        path = None if is_of_task or PRETRAIN.name in run.plans else run.teacher_section.path
        if path and not has_pooler(path):
            raise ValueError(
                f"{origin}: expected a teacher with trained weights of its pooler, {path} has "
                f"none; give another teacher, or {fix}"
            )
        for student in () if plan.stage.trains_head else run.students:
            family = student.sizes.model_type or DEFAULT
            if not format_of(family).holds_pooler(None):
                raise ValueError(
                    f"{origin}: expected {student.origin} of a family whose folders hold a pooler "
                    f"without a head, got {family}: it would be lost after the stage; move the "
                    "term to prediction"
                )


def _check_start(student: Student, teacher: Sizes) -> None:
    """Raises ValueError for a student whose sizes do not fit its `init` from teacher weights."""
    init = student.section.init
    if init == "random":
        return
    copies, reads_layers = init == "teacher_layers", init in ("teacher_layers", "teacher_reduced")
    if reads_layers and (student.sizes.model_type or DEFAULT) != (teacher.model_type or DEFAULT):
        raise ValueError(
            f"{student.origin}.model_type: expected that of the teacher, "
            f"{teacher.model_type or DEFAULT}, got {student.sizes.model_type or DEFAULT}, because "
            f"{student.origin}.init is {init}; set model_type to that, or choose another init"
        )
    is_equal = {"max_position_embeddings": False, "hidden_size": copies}
    if reads_layers:
        is_equal |= {"num_attention_heads": True, "intermediate_size": copies}
    sides: tuple[Side, ...] = ("encoder", "decoder") if all(depths(teacher)) else ("encoder",)
    for side, (name, equal) in itertools.product(sides, is_equal.items()):
        largest, got = (getattr(side_of(own, side), name) for own in (teacher, student.sizes))
        if got > largest or (equal and got != largest):
            raise ValueError(
                f"{student.origin}.{name}: expected {'' if equal else 'at most '}{largest} "
                f"(the teacher's{' ' + side if len(sides) > 1 else ''}), got {got}, because "
                f"{student.origin}.init is {init}; set it so, or set {student.origin}.init=random"
            )
    if reads_layers:
        with prefix_errors(f"{student.origin}.init_layers"):
            for ours, theirs in zip(depths(student.sizes), depths(teacher), strict=True):
                if ours:
                    make_layer_pairs(student.section.init_layers, ours, theirs)


def _check_same_sizes(path: str, teacher: Sizes) -> None:
    """Raises ValueError where sizes that change the outputs differ from the teacher's."""
    rates = {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}
    if isinstance(teacher, EncoderDecoderConfig):
        if encoder_decoder.load_encoder_decoder(path).config != teacher:
            raise ValueError(
                f"teacher.finetuned: expected the sizes and rates of teacher, got others in {path};"
                " give teacher.path and teacher.finetuned the same sizes"
            )
        return
    expected = teacher.model_dump(exclude=rates | {"initializer_range", "pad_token_id"})
    got = read_model(path).config.model_dump()
    different = [name for name in expected if got[name] != expected[name]]
    if different:
        raise ValueError(
            f"teacher.finetuned: expected the teacher's "
            f"{', '.join(f'{name} {expected[name]}' for name in different)}, got "
            f"{', '.join(f'{name} {got[name]}' for name in different)} in {path}; give "
            "teacher.path and teacher.finetuned the same sizes"
        )
