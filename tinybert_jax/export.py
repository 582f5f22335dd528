"""Rewrites a BERT folder of any age as a Hugging Face folder of today."""

from pathlib import Path

from tinybert_jax.convert import hf_files, hf_map
from tinybert_jax.tree import unflatten


def convert(source: str, target: str) -> Path:
    """`source`: a BERT folder or hub id, rewritten under today's names with every weight kept.

    Raises ValueError where the source has a weight that would be lost, or the target exists.
    """
    if Path(target).exists():
        raise ValueError(
            f"{target}: expected a folder that does not exist yet; nothing is replaced"
        )
    model = hf_files.read_model(source)
    tokenizer = hf_files.load_tokenizer(source)
    shapes = hf_map.our_shapes(model.tensors, model.config.num_hidden_layers)
    flat, _, surplus = hf_map.from_hf(model.tensors, shapes)
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
