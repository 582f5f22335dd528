"""Rewrites a BERT folder of any age as a Hugging Face folder of today."""

from pathlib import Path

import jax

from tinybert_jax.convert import hf_files, hf_folder, hf_map
from tinybert_jax.model.heads import make_classifier, make_masked_lm
from tinybert_jax.tree import flatten, unflatten


def convert(source: str, target: str) -> Path:
    """`source`: a BERT folder or hub id, rewritten under today's names with every weight kept.

    Only a next-sentence head is dropped. Raises ValueError where another weight would be lost or
    is lacking (the pooler may be), where weights and config differ, or where the target exists.
    """
    if Path(target).exists():
        raise ValueError(
            f"{target}: expected a folder that does not exist yet; nothing is replaced"
        )
    model = hf_files.read_model(source)
    tokenizer = hf_folder.load_tokenizer(source)
    flat, missing, surplus = hf_files.to_ours(model, _shapes(model))
    if missing:
        raise ValueError(f"{source}: lacks {list(missing)}; nothing was written")
    if surplus:
        raise ValueError(f"{source}: no place for {list(surplus)}; nothing was written")
    return hf_files.save_model(
        target,
        unflatten(flat),
        model.config,
        tokenizer,
        label_names=model.label_names,
        regression=model.problem_type == "regression",
    )


# Parts that a folder may have or not; one with a piece of a part has to have all of it.
_PARTS = (("encoder/pooler/",), ("transform/", "norm/", "decoder/"), ("classifier/",))


def _shapes(model: hf_files.HfModel) -> dict[str, tuple[int, ...]]:
    """Shapes by the config: of the encoder, and of each part that the tensors hold."""
    shapes = {}
    for _, init in (
        make_masked_lm(model.config),
        make_classifier(model.config, len(model.label_names or ()) or 1),
    ):
        abstract = flatten(jax.eval_shape(init, jax.random.key(0)))
        shapes |= {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    held = hf_map.our_shapes(model.tensors, model.config.num_hidden_layers)
    absent = [part for part in _PARTS if not any(path.startswith(part) for path in held)]
    unwanted = tuple(prefix for part in absent for prefix in part)
    return {path: shape for path, shape in shapes.items() if not path.startswith(unwanted)}
