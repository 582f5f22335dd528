"""What has to hold of a corpus before a run writes anything: more of `checks`."""

from collections.abc import Sequence
from typing import Any

from tinybert_jax.batches.loader import check_mixture
from tinybert_jax.batches.tokenize import MIN_TOKENS
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import StageSection
from tinybert_jax.data.wordpiece import backend_sha256
from tinybert_jax.tokens.store import Store


def check_stores(
    config: RunConfig,
    stages: Sequence[str],
    tokenizer: Any,
    stores: Sequence[tuple[Store, float]],
    heldout: Store | None,
) -> None:
    """Refuses stores of another tokenizer, without rows, or of a width that no stage reads."""
    expected = backend_sha256(tokenizer)
    given = [("corpus.stores", store) for store, _ in stores]
    given += [("corpus.heldout_store", heldout)] if heldout else []
    for origin, store in given:
        if store.manifest["tokenizer_sha256"] != expected:
            raise ValueError(
                f"{origin}: expected the run's tokenizer ({expected[:12]}), {store.folder} is "
                f"of another ({store.manifest['tokenizer_sha256'][:12]}); prepare the text with "
                "the run's tokenizer, or set tokenizer.path to the store's"
            )
        if not store.num_rows:
            raise ValueError(f"{origin}: expected rows, got none in {store.folder}")
    read = set()
    for name in (name for name in ("pretrain", "general") if getattr(config, name)):
        for part in getattr(config, name).parts():
            width = part.section.max_length
            alike = [pair for pair in stores if pair[0].width == width]
            if alike:
                read.add(width)
                check_mixture(*zip(*alike, strict=True))
            elif name in stages:
                widths = " or ".join(str(width) for width in sorted({s.width for s, _ in stores}))
                raise ValueError(
                    f"{name}.{part.key}max_length: expected {widths}, the width of the rows in "
                    f"corpus.stores, got {width}"
                )
    unread = [str(store.folder) for store, _ in stores if store.width not in read]
    if unread and (config.pretrain or config.general):
        raise ValueError(
            f"corpus.stores: expected rows as wide as a stage's max_length, got others in "
            f"{unread}; remove them, or give pretrain phases of that max_length"
        )
    if "pretrain" in stages and config.pretrain:
        _check_heldout(config.pretrain, heldout)
        if config.pretrain.pair_weight:
            widths = {part.section.max_length for part in config.pretrain.parts()}
            trained = [store for store, _ in stores if store.width in widths]
            _check_pair_labels([*trained, *([heldout] if heldout else [])])


def _check_heldout(section: StageSection, heldout: Store | None) -> None:
    if heldout and heldout.width > section.max_length:
        raise ValueError(
            f"corpus.heldout_store: expected rows of at most pretrain.max_length = "
            f"{section.max_length}, got {heldout.width} in {heldout.folder}; prepare it anew"
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
    """Refuses a corpus without a document long enough to learn from."""
    if not any(len(tokenizer.tokenize(text[:1000])) + 2 >= MIN_TOKENS for text in corpus):
        raise ValueError(
            f"{origin}: expected documents of {MIN_TOKENS - 2} pieces or more, got none in "
            f"{len(corpus)} documents; in a .txt file a blank line ends a document"
        )
