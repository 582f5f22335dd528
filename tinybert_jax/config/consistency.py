"""What the sections of a run ask of one another."""

import re
from collections.abc import Iterator
from typing import Any

from tinybert_jax.config.objectives import (
    DISTILL_STAGES,
    TERM_NAMES,
    LabelTerm,
    LogitsTerm,
    WordLogitsTerm,
)


def missing_needs(config: Any) -> Iterator[str]:
    """One mistake after the other of a `RunConfig` whose sections are each valid."""
    stages = set(config.stages)
    if stages & {"pretrain", "general"} and config.corpus is None:
        yield "the stages pretrain and general need a corpus section"
    if stages & {"finetune", "intermediate", "prediction", "baseline"} and config.task is None:
        yield "the stages finetune, intermediate, prediction and baseline need a task section"
    if stages & {*DISTILL_STAGES, "baseline"} and not config.family:
        yield "the distillation stages and baseline need a student section"
    yield from _needs_of_names(config)
    if config.finetune and config.teacher.finetuned:
        yield "expected a finetune section or teacher.finetuned, got both"
    for name in (name for name in DISTILL_STAGES if name in stages):
        yield from _needs_of_terms(config, name)
    yield from _needs_of_logits(config)
    if config.distillation.mask_rate is not None and "general" not in stages:
        yield "distillation.mask_rate is of the stage general: add it, or leave mask_rate out"
    for name in stages & {"pretrain", "general", "intermediate"}:
        section = getattr(config, name)
        has_text = name == "pretrain" and config.corpus and _holds_out(config.corpus)
        if section.patience or section.eval_every and not has_text:
            needed = "corpus.heldout_share or heldout_store"
            fix = f"; eval_every needs {needed}" if name == "pretrain" else ""
            yield f"{name} is not evaluated on a task: remove its patience and eval_every{fix}"
    if config.num_seeds > 1 and not stages - {"pretrain", "finetune"}:
        yield (
            "num_seeds is for students: add a stage that trains one, or remove it (of teachers: "
            "finetune.num_seeds)"
        )
    if config.corpus and config.corpus.stores:
        yield from _needs_of_stores(config, stages)
    elif config.pretrain and config.pretrain.pair_weight:
        yield "pretrain.pair_weight needs corpus.stores, prepared with mode pairs"
    if config.pretrain and config.pretrain.position_init != "normal" and config.teacher.path:
        yield (
            "pretrain.position_init is of a model from random weights, teacher.path brings its "
            "own: leave it out"
        )
    teacher = config.teacher
    if config.reads_teacher("general") and not (config.pretrain or teacher.path):
        yield (
            "general needs a teacher with weights: add a pretrain section, set teacher.path or "
            "leave it out (general=null)"
        )
    given = config.finetune or teacher.finetuned or teacher.path
    if not given and any(config.reads_teacher(name) for name in ("intermediate", "prediction")):
        yield (
            "intermediate and prediction need a teacher that knows the task: add a finetune "
            "section or set teacher.finetuned"
        )
    yield from _needs_of_tokenizer(config)
    yield from _needs_of_attention(config)


def _needs_of_tokenizer(config: Any) -> Iterator[str]:
    if config.tokenizer.vocab_size and config.corpus is None:
        yield "tokenizer.vocab_size trains a vocabulary on the corpus: it needs a corpus section"
    if config.tokenizer.vocab_size and (config.tokenizer.path or config.teacher.path):
        yield "tokenizer.vocab_size trains a vocabulary: give no tokenizer.path or teacher.path"
    if not (config.tokenizer.lowercase or config.tokenizer.vocab_size):
        yield (
            "tokenizer.lowercase is for a vocabulary that is trained (tokenizer.vocab_size); a "
            "folder's tokenizer has its own: leave it out"
        )
    if not (config.tokenizer.path or config.tokenizer.vocab_size or config.teacher.path):
        yield "expected a tokenizer: tokenizer.path, tokenizer.vocab_size or teacher.path"


def _needs_of_attention(config: Any) -> Iterator[str]:
    """Of flash attention that is asked for by name."""
    name = config.compute.attention
    if name in ("auto", "xla"):
        return
    origin, fix = f"compute.attention {name}", "or set compute.attention=auto"
    for dtype, got in (
        ("dtype", config.compute.dtype),
        ("teacher_dtype", config.compute.teacher_dtype or "bfloat16"),
    ):
        if name == "cudnn" and got != "bfloat16":
            yield f"{origin}: expected compute.{dtype} bfloat16, got {got}: set it, {fix}"
    for stage in config.stages:
        num_seeds = len(config.seeds(stage))
        if num_seeds > 1:
            yield f"{origin}: expected one seed, got {num_seeds} in {stage}: one by one, {fix}"
        for part in getattr(config, stage).parts():
            has_stores = stage in ("pretrain", "general") and config.corpus and config.corpus.stores
            is_one_width = part.section.batching == "pack" or has_stores
            widths = (part.section.max_length,) if is_one_width else part.section.buckets()
            others = [width for width in widths if width % 128]
            if others:
                yield (
                    f"{origin}: expected rows of a multiple of 128 tokens, got {others} in "
                    f"{stage}: set {stage}.batching=pack and {stage}.{part.key}max_length, {fix}"
                )


def _needs_of_logits(config: Any) -> Iterator[str]:
    section = config.distillation
    if section.further_teachers and section.keep_logits is False:
        yield "distillation.keep_logits: the logits of further_teachers are kept: leave it out"
    elif section.further_teachers or section.keep_logits:
        if not config.makes_logits_first("prediction"):
            name = "further_teachers" if section.further_teachers else "keep_logits"
            yield (
                f"distillation.{name}: expected a prediction stage with a term logits, which reads "
                "them; add it, or leave them out"
            )


def _needs_of_names(config: Any) -> Iterator[str]:
    """A member's name is that of folders, of metrics beside the terms', and a key on its own."""
    names = tuple(config.students or ())
    if config.student and names:
        yield f"expected student or students, got both (students: {', '.join(names)}): drop one"
    for place, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            rule = "up to 64 letters, digits, - and _, the first a letter or a digit"
        elif re.search(r"(^|-)seed-\d+$", name):
            rule = "another end than seed-<number>, which a seed's folder has"
        elif name == "layers":
            rule = "another name than layers, which is that of a model's own parameters"
        elif re.fullmatch(rf"({'|'.join([*TERM_NAMES, 'soft'])})(_\d+)?", name):
            rule = "another name than a term's, which is that of a part of the loss"
        elif name.lower() in [other.lower() for other in names[:place]]:
            rule = "names that differ in more than capitals: some file systems take them for one"
        else:
            continue
        yield f"students.{name}: expected {rule}; got '{name}': choose another name"


def _needs_of_terms(config: Any, stage: str) -> Iterator[str]:
    distillation, origin = config.distillation, f"distillation.{stage}"
    terms = distillation.terms(stage)
    names = {term.term for term in terms}
    if not terms:
        yield (
            f"{origin}: expected a term with a weight above 0, got none (preset "
            f"{distillation.preset}): give it terms, or remove the stage {stage}"
        )
    if "label" in names and config.task and config.task.unlabelled:
        yield f"{origin}: the term label needs labels: give no task.unlabelled"
    stores = stage == "general" and config.corpus and config.corpus.stores
    if "cls" in names and stores:
        yield f"{origin}: the term cls needs a row an example, not corpus.stores: give corpus.files"
    if distillation.normalisation == "paper_code":
        # What counts tokens, and has no such form.
        others = sorted({"relation", "cosine"} & names)
        if any(isinstance(term, WordLogitsTerm) and term.at == "real" for term in terms):
            others.append("word_logits")
        if others:
            yield f"distillation.normalisation: paper_code knows no {others}: set valid_only"
        is_packed = stores or getattr(config, stage).batching == "pack"
        if is_packed and names & {"attention", "hidden", "embedding"}:
            yield f"{stage}: batching pack has no padding to count: set valid_only or bucket"
    if config.task and config.task.regression:
        for term in terms:
            ignored = {"term", "weight"} if isinstance(term, LogitsTerm | LabelTerm) else None
            changed = term.model_dump(exclude_defaults=True, exclude=ignored) if ignored else {}
            if changed:
                yield f"{origin}: {term.term} of a regression has no {sorted(changed)}: remove it"


def _holds_out(corpus: Any) -> bool:
    return bool(corpus.heldout_share or corpus.heldout_store)


def _needs_of_stores(config: Any, stages: set[str]) -> Iterator[str]:
    if config.tokenizer.vocab_size:
        yield "tokenizer.vocab_size trains a vocabulary on text: corpus.stores have one already"
    for name in sorted(stages & {"pretrain", "general"}):
        ignored = {"batching", "length_buckets"} & getattr(config, name).model_fields_set
        if ignored:
            yield f"{name}: the rows of corpus.stores are laid out: remove {sorted(ignored)}"
