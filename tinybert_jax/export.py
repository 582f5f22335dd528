"""Rewrites a BERT folder of any age as a Hugging Face folder of today."""

from pathlib import Path

from tinybert_jax.convert import hf_files, hf_folder, hf_map
from tinybert_jax.tree import unflatten


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
    held = hf_map.our_shapes(model.tensors, model.config.num_hidden_layers)
    flat, missing, surplus = hf_files.to_ours(model, hf_map.config_shapes(model.config, held))
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
