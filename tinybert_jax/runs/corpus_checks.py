"""Checks of the corpus of a run, before the run writes anything."""

from collections.abc import Sequence
from typing import Any

from tinybert_jax.batches.loader import check_mixture
from tinybert_jax.batches.tokenize import MIN_TOKENS
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import StageSection
from tinybert_jax.data.wordpiece import backend_sha256
from tinybert_jax.runs.run import Run
from tinybert_jax.tokens.store import Store


def check_stores(run: Run, plans: Sequence[StagePlan]) -> None:
    """Raises ValueError for a store of another tokenizer, without rows, or of an unused width."""
    stores, heldout = run.stores, run.heldout_store
    _check_tokenizers(run)
    read: set[int] = set()
    on_corpus = [plan for plan in run.plans.values() if plan.stage.reads_corpus]
    for plan in on_corpus:
        for part in plan.section.parts():
            width = part.section.max_length
            alike = [pair for pair in stores if pair[0].width == width]
            if alike:
                read.add(width)
                check_mixture(*zip(*alike, strict=True))
            elif plan in plans:
                widths = " or ".join(str(width) for width in sorted({s.width for s, _ in stores}))
                raise ValueError(
                    f"{plan.name}.{part.key}max_length: expected {widths}, the width of the rows "
                    f"in corpus.stores, got {width}; set it to that width"
                )
    unread = [str(store.folder) for store, _ in stores if store.width not in read]
    if unread and on_corpus:
        raise ValueError(
            f"corpus.stores: expected rows as wide as a stage's max_length, got other widths in "
            f"{unread}; remove these stores, or add a phase of that max_length to pretrain"
        )
    for plan in (plan for plan in plans if plan in on_corpus and not plan.stage.distils):
        _check_heldout(plan.section, heldout)
        if plan.section.pair_weight:
            widths = {part.section.max_length for part in plan.section.parts()}
            trained = [store for store, _ in stores if store.width in widths]
            _check_pair_labels([*trained, *([heldout] if heldout else [])])


def _check_tokenizers(run: Run) -> None:
    expected = backend_sha256(run.tokenizer)
    given = [("corpus.stores", store) for store, _ in run.stores]
    given += [("corpus.heldout_store", run.heldout_store)] if run.heldout_store else []
    for origin, store in given:
        if store.manifest["tokenizer_sha256"] != expected:
            raise ValueError(
                f"{origin}: expected the run's tokenizer ({expected[:12]}), got another "
                f"({store.manifest['tokenizer_sha256'][:12]}) in {store.folder}; prepare the text "
                "with the run's tokenizer, or set tokenizer.path to the store's tokenizer"
            )
        if not store.num_rows:
            raise ValueError(
                f"{origin}: expected rows, got none in {store.folder}; remove the store"
            )


def _check_heldout(section: StageSection, heldout: Store | None) -> None:
    if heldout and heldout.width > section.max_length:
        raise ValueError(
            f"corpus.heldout_store: expected rows of at most pretrain.max_length = "
            f"{section.max_length}, got {heldout.width} in {heldout.folder}; prepare the text "
            f"again with width={section.max_length}"
        )


def _check_pair_labels(stores: Sequence[Store]) -> None:
    labels = {store.folder: _pair_label(store) for store in stores}
    if None in labels.values() or len(set(labels.values())) > 1:
        shown = ", ".join(f"{folder}: {label or 'none'}" for folder, label in labels.items())
        raise ValueError(
            f"pretrain.pair_weight: expected stores with one kind of pair label, got {shown}; "
            "prepare the text with mode=pairs and one pair_label, or set pair_weight to 0"
        )


def _pair_label(store: Store) -> str | None:
    settings = store.manifest["settings"]
    return settings["pair_label"] if settings["mode"] == "pairs" else None


def check_corpus(tokenizer: Any, corpus: Sequence[str], origin: str = "corpus") -> None:
    """Raises ValueError for a corpus without a document of at least `MIN_TOKENS` tokens."""
    if not any(len(tokenizer.tokenize(text[:1000])) + 2 >= MIN_TOKENS for text in corpus):
        raise ValueError(
            f"{origin}: expected documents of {MIN_TOKENS - 2} pieces or more, got none in "
            f"{len(corpus)} documents; in a .txt file a blank line ends a document"
        )
