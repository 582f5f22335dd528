"""Checks between the sections of a `RunConfig`."""

import re
from collections.abc import Iterator
from typing import Any

from tinybert_jax.config.stages import Stage
from tinybert_jax.terms.table import TERM_NAMES


def consistency_errors(config: Any) -> Iterator[str]:
    """Yields one message per error between the sections of `config`.

    `config`: a `RunConfig` whose sections have passed their separate checks.
    """
    stages = config.stages
    if any(stage.reads_corpus for stage in stages) and config.corpus is None:
        yield "the stages pretrain and general need a corpus section"
    if any(not stage.reads_corpus for stage in stages) and config.task is None:
        yield "the stages finetune, intermediate, prediction and baseline need a task section"
    if any(stage.role == "student" for stage in stages) and not config.students_by_name:
        yield "the distillation stages and baseline need a student section"
    if config.export == "best" and not (config.prediction and config.baseline):
        yield (
            "export: best compares the stages prediction and baseline: add both sections, or "
            "remove export"
        )
    yield from _needs_of_update(config)
    yield from _needs_of_names(config)
    if config.finetune and config.teacher.finetuned:
        yield "expected a finetune section or teacher.finetuned, got both; remove one"
    for stage in (stage for stage in stages if stage.distils):
        yield from _needs_of_terms(config, stage)
    yield from _needs_of_logits(config)
    if config.distillation.mask_rate is not None and config.general is None:
        yield "distillation.mask_rate is for the stage general: add it, or leave mask_rate out"
    yield from _needs_of_evaluation(config)
    if config.num_seeds > 1 and all(stage.role == "teacher" for stage in stages):
        yield (
            "num_seeds is for students: add a stage that trains a student, or remove num_seeds "
            "(teachers have finetune.num_seeds)"
        )
    if config.corpus and config.corpus.stores:
        yield from _needs_of_stores(config)
    elif config.pretrain and config.pretrain.pair_weight:
        yield "pretrain.pair_weight needs corpus.stores, prepared with mode pairs"
    if config.pretrain and config.pretrain.position_init != "normal" and config.teacher.path:
        yield (
            "pretrain.position_init is for a model with random weights, but teacher.path has "
            "trained positions: leave it out"
        )
    yield from _needs_of_teachers(config)
    yield from _needs_of_tokenizer(config)
    yield from _needs_of_attention(config)
    for stage in stages:
        section = getattr(config, stage.name)
        if section.decay_towards == "start" and not section.weight_decay:
            yield f"{stage.name}: decay_towards: start without weight_decay does nothing: set it"
        if getattr(section, "r_drop", 0) and section.dropout == 0:
            yield f"{stage.name}: r_drop compares two draws of dropout: remove dropout: 0"
        if config.task:
            yield from _needs_of_task(config.task, stage.name, section)
    yield from _needs_of_embeddings(config)
    yield from _needs_of_translation(config)


def _needs_of_translation(config: Any) -> Iterator[str]:
    """What an encoder-decoder cannot do, and what only it can."""
    models = {"teacher": config.teacher, **config.students_by_name}
    if config.task is None or config.task.kind != "translation":
        if config.distillation.targets != "given":
            yield "distillation.targets: teacher is for task.kind translation: remove it"
        for name, model in models.items():
            if model.num_decoder_layers:
                yield f"{name}: num_decoder_layers is for task.kind translation: remove it"
        for stage in (stage for stage in config.stages if stage.distils):
            for term in config.distillation.terms(stage.name):
                if term.read_side != "encoder":
                    origin = f"distillation.{stage.name}, term {term.name}"
                    yield f"{origin}: side is for task.kind translation: remove it"
        return
    known = ("finetune", "prediction", "baseline")
    for stage in config.stages:
        section = getattr(config, stage.name)
        if stage.name not in known:
            yield f"{stage.name}: translation has the stages {', '.join(known)}: remove it"
        if getattr(section, "trained_words", "all") != "all":
            yield f"{stage.name}.trained_words: a model writes words that no source has: remove it"
        if getattr(section, "head_init", "random") != "random":
            yield f"{stage.name}.head_init: words have no probe: remove it"
    if config.distillation.normalisation != "valid_only":
        yield "distillation.normalisation: translation has valid_only alone: remove it"
    if config.has_several_teachers or config.distillation.keep_logits:
        yield "translation: one teacher, and no logits of all words are kept: remove keep_logits"
    for name, model in models.items():
        if getattr(model, "init", "random") not in ("random", "teacher_layers"):
            yield (
                f"{name}.init: encoder-decoders start at random, from teacher_layers or from a "
                "folder: choose one of them"
            )
        elif not isinstance(getattr(model, "init_layers", ""), str):
            yield f"{name}.init_layers: expected a rule for both sides: set uniform, top or bottom"
    for term in config.distillation.terms("prediction") if config.prediction else ():
        origin = f"distillation.prediction, term {term.name}"
        if term.name not in _TRANSLATION_TERMS:
            yield f"{origin}: expected {', '.join(_TRANSLATION_TERMS)} with translation: remove it"
        elif term.name == "logits" and (term.form, term.where, term.reduction) != _WORDS:
            yield f"{origin}: expected form: kl with translation, and nothing else: set it"


_TRANSLATION_TERMS = ("label", "logits", "attention", "hidden", "embedding")
_WORDS = ("kl", "all", "sum")  # form, where and reduction of logits over words


def _needs_of_update(config: Any) -> Iterator[str]:
    task, update = config.task, config.update
    if (update is None) != (task is None or task.old is None):
        yield "expected a section update and task.old, got one of them: add or remove the other"
    if update is None or task is None:
        return
    if task.kind != "classification":
        yield f"update: expected task.kind classification, got {task.kind}: train a new model"
    elif not isinstance(task.labels, tuple):
        yield "update: expected task.labels as a list, those of the old model first: write it"
    if not (config.student and config.student.path):
        yield "update: expected student.path, the folder of the old model: set it"


def _needs_of_task(task: Any, stage: str, section: Any) -> Iterator[str]:
    """What a stage may not have with a task of this kind."""
    if task.form == "square" and getattr(section, "label_smoothing", 0) > 0:
        yield f"{stage}: a regression has no label_smoothing: remove it"
    for name in ("class_weights", "r_drop") if task.form != "softmax" else ():
        if getattr(section, name, None):
            yield (
                f"{stage}.{name} is for tasks with one class per unit (classification, "
                "tagging): remove it"
            )
    if task.kind == "embeddings":
        for name, plain in (("label_smoothing", 0.0), ("head_init", "random")):
            if getattr(section, name, plain) != plain:
                yield f"{stage}.{name}: embeddings have no classes and no head: remove it"
    if task.kind == "question_answering":
        if getattr(section, "label_smoothing", 0) > 0:
            yield f"{stage}.label_smoothing: answers have no classes to smooth over: remove it"
        if getattr(section, "head_init", "random") != "random":
            yield f"{stage}.head_init: starts and ends of answers have no probe: set random"
        if getattr(section, "class_weights", None):
            yield f"{stage}.class_weights: answers have no classes: remove it"


def _needs_of_embeddings(config: Any) -> Iterator[str]:
    """The terms and stages of sentence vectors, and what they need of the task."""
    task = config.task if config.task and config.task.kind == "embeddings" else None
    trains = False  # whether a stage trains the widths
    for stage in config.stages:
        section, terms = getattr(config, stage.name), ()
        is_supervised = not stage.distils and not stage.reads_corpus
        if stage.distils:
            terms = config.distillation.terms(stage.name)
        for term in terms:
            origin = f"distillation.{stage.name}, term {term.name}"
            if term.needs_embeddings and not task:
                yield f"{origin}: expected task.kind embeddings: set it, or remove the term"
            if task and term.reads.task_logits and not term.needs_embeddings:
                yield f"{origin}: embeddings have no classes: use sentence or similarity"
            if task and term.needs_partners and task.rows not in ("pairs", "triplets"):
                yield (
                    f"{origin}: expected task.rows pairs or triplets, got {task.rows}: change one"
                )
        couples = any(term.couples_examples for term in terms) or bool(task and is_supervised)
        trains = trains or couples
        if couples and section.gradient_accumulation_steps > 1:
            yield (
                f"{stage.name}: texts are compared with the whole batch: remove "
                "gradient_accumulation_steps"
            )
        if task and is_supervised and task.rows == "sentences":
            yield (
                f"{stage.name}: expected task.rows pairs, triplets or scored_pairs to train on, "
                "got sentences: change it, or remove the stage"
            )
    if task and config.has_several_teachers:
        yield "embeddings: vectors of several teachers have no common space: name one teacher"
    if task and not any(stage.trains_head for stage in config.stages):
        yield "embeddings: expected a stage that ends in vectors, got none: add prediction"
    if task and task.widths and not trains:
        yield "task.widths: expected a term contrastive or similarity: add one, or remove widths"


def _needs_of_evaluation(config: Any) -> Iterator[str]:
    """Pretrain is evaluated on held-out text; general and intermediate are not evaluated."""
    for stage in (stage for stage in config.stages if not stage.trains_head):
        section = getattr(config, stage.name)
        is_pretrain = not stage.distils
        has_text = is_pretrain and config.corpus and _holds_out(config.corpus)
        if section.patience or section.eval_every and not has_text:
            needed = "corpus.heldout_share or heldout_store"
            fix = f"; eval_every needs {needed}" if is_pretrain else ""
            rule = f"{stage.name} is not evaluated on a task"
            yield f"{rule}: remove its patience and eval_every{fix}"


def _needs_of_teachers(config: Any) -> Iterator[str]:
    teacher = config.teacher
    read = {stage.teacher for stage in config.stages if config.reads_teacher(stage)}
    if "pretrained" in read and not (config.pretrain or teacher.path):
        yield (
            "general needs a teacher with weights: add a pretrain section, set teacher.path, or "
            "remove the stage (general=null)"
        )
    if "task" in read and not (config.finetune or teacher.finetuned or teacher.path):
        yield (
            "intermediate and prediction need a fine-tuned teacher: add a finetune section or set "
            "teacher.finetuned"
        )


def _needs_of_tokenizer(config: Any) -> Iterator[str]:
    translates = config.task is not None and config.task.kind == "translation"
    if config.tokenizer.vocab_size and config.corpus is None and not translates:
        yield "tokenizer.vocab_size trains a vocabulary on the corpus: add a corpus section"
    if config.tokenizer.vocab_size and (config.tokenizer.path or config.teacher.path):
        yield "tokenizer.vocab_size trains a vocabulary: remove tokenizer.path and teacher.path"
    trained = config.tokenizer.vocab_size or config.tokenizer.target_vocab_size
    if not (config.tokenizer.lowercase or trained):
        yield (
            "tokenizer.lowercase is for a vocabulary that is trained (tokenizer.vocab_size), not "
            "for a folder's tokenizer: leave it out"
        )
    if not (config.tokenizer.path or config.tokenizer.vocab_size or config.teacher.path):
        yield "expected a tokenizer: set tokenizer.path, tokenizer.vocab_size or teacher.path"
    own = {name for name in ("target_path", "target_vocab_size") if getattr(config.tokenizer, name)}
    if own and not translates:
        yield f"tokenizer.{min(own)} is of the targets of a translation: leave it out"
    if len(own) > 1:
        yield "tokenizer.target_path and tokenizer.target_vocab_size: set one of them"
    if config.tokenizer.target_vocab_size and config.teacher.path:
        yield "tokenizer.target_vocab_size trains a vocabulary: remove teacher.path"


def _needs_of_attention(config: Any) -> Iterator[str]:
    """Checks a flash attention backend that `compute.attention` names."""
    name = config.compute.attention
    if name in ("auto", "xla"):
        return
    origin, fix = f"compute.attention {name}", "or set compute.attention=auto"
    for dtype, got in (
        ("dtype", config.compute.dtype),
        ("teacher_dtype", config.compute.teacher_dtype or "bfloat16"),
    ):
        has_bfloat16 = got == "bfloat16" or (dtype, got) == ("teacher_dtype", "float8_products")
        if name in ("cudnn", "triton") and not has_bfloat16:
            yield f"{origin}: expected compute.{dtype} bfloat16, got {got}: set that dtype, {fix}"
    for stage in config.stages:
        num_seeds = len(config.seeds(stage))
        if num_seeds > 1:
            told = f"expected one seed, got {num_seeds} in {stage.name}: set num_seeds=1"
            yield f"{origin}: {told}, {fix}"
        for part in getattr(config, stage.name).parts():
            has_stores = stage.reads_corpus and config.corpus and config.corpus.stores
            is_one_width = part.section.batching == "pack" or has_stores
            widths = (part.section.max_length,) if is_one_width else part.section.buckets()
            others = [width for width in widths if width % 128 and name != "triton"]
            if others:
                yield (
                    f"{origin}: expected rows of a multiple of 128 tokens, got {others} in "
                    f"{stage.name}: set {stage.name}.batching=pack and "
                    f"{stage.name}.{part.key}max_length, {fix}"
                )


def _needs_of_logits(config: Any) -> Iterator[str]:
    section = config.distillation
    origin = "distillation.keep_logits"
    if config.has_several_teachers:
        several = "distillation.further_teachers"
        origin = several if section.further_teachers else "finetune.teach"
    if config.has_several_teachers and section.keep_logits is False:
        yield (
            "distillation.keep_logits: expected true or null, got false: the logits of several "
            f"teachers ({origin}) are always kept; remove keep_logits"
        )
    elif config.has_several_teachers or section.keep_logits:
        if not any(config.keeps_logits(stage) for stage in config.stages):
            yield (
                f"{origin}: expected a prediction stage with a term logits, got none; add that "
                f"term, or remove {origin.split('.')[1]}"
            )
    is_probe = config.prediction and config.prediction.head_init == "linear_probe"
    if is_probe and not any(config.keeps_logits(stage) for stage in config.stages):
        yield (
            "prediction.head_init: linear_probe fits the teacher's logits, which this run does not "
            "keep: set prediction.head_init: random, or give distillation.prediction a term logits "
            "and leave keep_logits out"
        )
    if config.finetune and config.finetune.teach == "mean" and config.finetune.num_seeds == 1:
        yield (
            "finetune.teach: mean is of several teachers: set finetune.num_seeds to 2 or more, or "
            "remove teach"
        )


def _needs_of_names(config: Any) -> Iterator[str]:
    """Checks student names, which become parts of folder names, metric names and keys."""
    names = tuple(config.students or ())
    if config.student and names:
        yield f"expected student or students, got both (students: {', '.join(names)}): remove one"
    for place, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            rule = "up to 64 letters, digits, - and _, with a letter or digit first"
        elif re.search(r"(^|-)seed-\d+$", name):
            rule = "a name that does not end in seed-<number>, as the folder of a seed does"
        elif name == "layers":
            rule = "another name than layers, which is a key of the parameters"
        elif re.fullmatch(rf"({'|'.join([*TERM_NAMES, 'soft'])})(_\d+)?", name):
            rule = "a name that is not a term, because a term is the name of a part of the loss"
        elif name.lower() in [other.lower() for other in names[:place]]:
            rule = "names that differ in more than capitals, which some file systems ignore"
        else:
            continue
        yield f"students.{name}: expected {rule}, got '{name}': choose another name"


def _needs_of_terms(config: Any, stage: Stage) -> Iterator[str]:
    distillation, origin = config.distillation, f"distillation.{stage.name}"
    terms = distillation.terms(stage.name)
    if not terms:
        yield (
            f"{origin}: expected a term with a weight above 0, got none (preset "
            f"{distillation.preset}): add terms to {origin}, or remove the stage {stage.name}"
        )
    is_unlabelled = config.task and config.task.unlabelled
    for name in sorted({term.name for term in terms if is_unlabelled and term.needs_labels}):
        yield f"{origin}: the term {name} needs labels: remove task.unlabelled"
    is_smooth = any(getattr(term, "label_smoothing", 0) > 0 for term in terms)
    if is_smooth and config.task and config.task.kind == "question_answering":
        yield f"{origin}, label_smoothing: answers have no classes to smooth over: remove it"
    stores = stage.reads_corpus and config.corpus and config.corpus.stores
    for name in sorted({term.name for term in terms if stores and term.needs_examples}):
        yield (
            f"{origin}: the term {name} needs one example per row, not corpus.stores: set "
            "corpus.files instead"
        )
    is_pretrained = config.pretrain and stage.teacher == "pretrained"
    lacks_pooler = is_pretrained and not config.pretrain.pair_weight
    for name in sorted({term.name for term in terms if lacks_pooler and term.reads.pooled}):
        yield (
            f"{origin}: the term {name} needs a trained pooler, which pretrain trains only with "
            "sentence pairs: set pretrain.pair_weight, move the term to intermediate or "
            "prediction, or leave pretrain out and set teacher.path to a model with a pooler"
        )
    if distillation.normalisation == "paper_code":
        # These losses are means over real tokens; they have no variant that counts the padding.
        others = sorted({term.name for term in terms if term.mean_over == "tokens"})
        if others:
            yield f"distillation.normalisation: paper_code has no {others}: set valid_only"
        is_packed = stores or getattr(config, stage.name).batching == "pack"
        if is_packed and any(term.mean_over == "positions" for term in terms):
            yield (
                f"{stage.name}: paper_code counts padding, packed rows have no padding to count: "
                "set distillation.normalisation=valid_only, or batching=bucket without stores"
            )
    if config.task and config.task.form == "square":
        for term in (term for term in terms if term.reads.task_logits):
            changed = term.model_dump(exclude_defaults=True, exclude={"term", "weight"})
            if changed:
                yield f"{origin}: {term.name} of a regression has no {sorted(changed)}: remove it"


def _holds_out(corpus: Any) -> bool:
    return bool(corpus.heldout_share or corpus.heldout_store)


def _needs_of_stores(config: Any) -> Iterator[str]:
    if config.tokenizer.vocab_size:
        yield (
            "tokenizer.vocab_size trains a vocabulary on text, but corpus.stores have one already: "
            "set tokenizer.path instead"
        )
    for stage in (stage for stage in config.stages if stage.reads_corpus):
        section = getattr(config, stage.name)
        is_default = {
            "batching": section.batching == "bucket",
            "length_buckets": section.length_buckets is None,
        }
        ignored = sorted(name for name, default in is_default.items() if not default)
        if ignored:
            yield f"{stage.name}: the rows of corpus.stores have a fixed layout: remove {ignored}"
