"""What the sections of a run ask of one another."""

from collections.abc import Iterator
from typing import Any


def missing_needs(config: Any) -> Iterator[str]:
    """One mistake after the other of a `RunConfig` whose sections are each valid."""
    stages = set(config.stages)
    if stages & {"pretrain", "general"} and config.corpus is None:
        yield "the stages pretrain and general need a corpus section"
    if stages & {"finetune", "intermediate", "prediction", "baseline"} and config.task is None:
        yield "the stages finetune, intermediate, prediction and baseline need a task section"
    if stages & {"general", "intermediate", "prediction", "baseline"} and config.student is None:
        yield "the distillation stages and baseline need a student section"
    if config.finetune and config.teacher.finetuned:
        yield "expected a finetune section or teacher.finetuned, got both"
    if config.task and config.task.unlabelled and config.distillation.hard_weight:
        yield "distillation.hard_weight needs labels: set it to 0 or give no task.unlabelled"
    for name in stages & {"pretrain", "general", "intermediate"}:
        section = getattr(config, name)
        has_text = name == "pretrain" and config.corpus and _holds_out(config.corpus)
        if section.patience or section.eval_every and not has_text:
            needed = "corpus.heldout_share or heldout_store"
            fix = f"; eval_every needs {needed}" if name == "pretrain" else ""
            yield f"{name} is not evaluated on a task: remove its patience and eval_every{fix}"
    if config.num_seeds > 1 and not stages - {"pretrain", "finetune"}:
        yield "num_seeds is for students: add a stage that trains one, or remove it"
    if config.corpus and config.corpus.stores:
        yield from _needs_of_stores(config, stages)
    elif config.pretrain and config.pretrain.pair_weight:
        yield "pretrain.pair_weight needs corpus.stores, prepared with mode pairs"
    if config.tokenizer.vocab_size and config.corpus is None:
        yield "tokenizer.vocab_size trains a vocabulary on the corpus: it needs a corpus section"
    if config.tokenizer.vocab_size and (config.tokenizer.path or config.teacher.path):
        yield "tokenizer.vocab_size trains a vocabulary: give no tokenizer.path or teacher.path"
    if not (config.tokenizer.lowercase or config.tokenizer.vocab_size):
        yield (
            "tokenizer.lowercase is for a vocabulary that is trained (tokenizer.vocab_size); a "
            "folder's tokenizer has its own: leave it out"
        )
    teacher, distillation = config.teacher, config.distillation
    if "general" in stages and not (config.pretrain or teacher.path):
        yield "general needs a teacher with weights: add a pretrain section or set teacher.path"
    given = config.finetune or teacher.finetuned or teacher.path
    if stages & {"intermediate", "prediction"} and not given:
        yield (
            "intermediate and prediction need a teacher that knows the task: add a finetune "
            "section or set teacher.finetuned"
        )
    for name in stages & {"general", "intermediate"}:
        is_packed = name == "general" and config.corpus and config.corpus.stores
        is_packed = is_packed or getattr(config, name).batching == "pack"
        if distillation.normalisation == "paper_code" and is_packed:
            yield f"{name}: batching pack has no padding to count: set valid_only or bucket"
    weights = ("attention_weight", "hidden_weight", "embedding_weight")
    is_idle = not any(getattr(distillation, name) for name in weights)
    if stages & {"general", "intermediate"} and is_idle:
        yield f"distillation: expected one of {list(weights)} above 0, got 0 for all"
    if not (config.tokenizer.path or config.tokenizer.vocab_size or config.teacher.path):
        yield "expected a tokenizer: tokenizer.path, tokenizer.vocab_size or teacher.path"


def _holds_out(corpus: Any) -> bool:
    return bool(corpus.heldout_share or corpus.heldout_store)


def _needs_of_stores(config: Any, stages: set[str]) -> Iterator[str]:
    if config.tokenizer.vocab_size:
        yield "tokenizer.vocab_size trains a vocabulary on text: corpus.stores have one already"
    for name in sorted(stages & {"pretrain", "general"}):
        ignored = {"batching", "length_buckets"} & getattr(config, name).model_fields_set
        if ignored:
            yield f"{name}: the rows of corpus.stores are laid out: remove {sorted(ignored)}"
