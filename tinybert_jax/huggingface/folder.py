"""Reads and writes Hugging Face model folders: config.json and safetensors.

Weights are read from safetensors only: no pickle is opened and no code from a folder is run.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinybert_jax.huggingface.config_json import read_config, write_config
from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.head import (
    Head,
    head_part,
    head_tensor,
    is_unnamed,
    read_head,
    read_label_names,
    wanted_head,
)
from tinybert_jax.huggingface.hub import find_folder, save_tokenizer
from tinybert_jax.huggingface.tensors import WEIGHTS, Tensors, open_tensors
from tinybert_jax.huggingface.untrusted import CONFIG, check_folder, read_json
from tinybert_jax.huggingface.weights import (
    Conversion,
    config_shapes,
    from_hf,
    has_tensor,
    to_hf,
)
from tinybert_jax.models.params import Params, flatten, unflatten
from tinybert_jax.parallel import processes
from tinybert_jax.settings.sizes import ModelConfig


class HfModel(NamedTuple):
    """The content of a model folder: sizes, the task head if it has one, and all tensors."""

    folder: Path
    config: ModelConfig
    label_names: tuple[str, ...] | None  # from config.json, also without a head
    head: Head | None
    tensors: Tensors


class Loaded(NamedTuple):
    """Parameters from a folder."""

    params: Params
    missing: tuple[str, ...]  # paths that the folder lacks: they have initial values
    surplus: tuple[str, ...]  # tensors of the folder that the model does not use


def read_model(path: str | Path) -> HfModel:
    """Reads and checks config.json and the headers of the weights of a local folder or a hub id.

    No JAX device is used, and no tensor is read before it is asked for. A save that replaces the
    folder later changes nothing: the files stay open. Raises ValueError for a folder that cannot be
    read or is not supported, and for one that is replaced in this moment.
    """
    folder = find_folder(path)
    before = _identity(folder)
    check_folder(folder)
    raw = read_json(folder / CONFIG)
    config, names = read_config(raw, folder), read_label_names(raw, folder)
    tensors = open_tensors(folder)
    if _identity(folder) != before:
        raise ValueError(
            f"{folder}: expected a folder that stays, got one that was replaced while it was read; "
            "run the command again"
        )
    model = HfModel(folder, config, names, None, tensors)
    kernel = head_tensor(tensors)
    if kernel is None:
        return model
    head = read_head(raw, folder, tensors.shape(kernel))
    return model._replace(head=head, label_names=head.label_names)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from one that replaces it; None where there is none."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def has_pooler(path: str | Path) -> bool:
    """Whether a local folder or a hub id has weights of its family's pooler."""
    model = read_model(path)
    return has_tensor(format_of(model.config.model_type), model.tensors, "encoder/pooler/kernel")


def load_params(
    model: HfModel, abstract: Mapping[str, Any], init: Callable[[], Mapping[str, Any]]
) -> Loaded:
    """Parameters with the shapes of `abstract`; those that the folder lacks come from `init()`.

    Raises ValueError where the folder does not fit: the encoder has to be complete except for the
    pooler, and all its tensors have to be used. Heads may be missing or unused; `Loaded` lists
    them.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    if "embeddings/word/embedding" in shapes:  # a bare encoder
        whole = load_params(model, {"encoder": abstract}, lambda: {"encoder": init()})
        return whole._replace(params=whole.params["encoder"])
    if not _head_fits(model, shapes):
        assert model.head is not None
        if model.head.kind != wanted_head(shapes):
            raise ValueError(
                f"{model.folder}: expected a head of the kind {wanted_head(shapes)}, got one of "
                f"the kind {model.head.kind}; use a folder with that head, or without a head"
            )
        raise ValueError(
            f"{model.folder}: expected a head with {shapes['classifier/kernel'][1]} labels, "
            f"got one with {len(model.head.label_names)}: "
            f"{list(model.label_names or ())}; set task.labels to the labels that it was trained "
            "with, or use a folder without a head"
        )
    flat, missing, surplus = convert_params(model, shapes)
    form = format_of(model.config.model_type)
    pooler = form.name_of("encoder/pooler/kernel").removesuffix("weight")
    unused = [n for n in surplus if n.startswith(form.base_prefix) and not n.startswith(pooler)]
    if unused:
        raise ValueError(
            f"{model.folder}: expected the weights of a plain {form.class_prefix} with "
            f"{model.config.num_hidden_layers} layers, got also {unused[:4]}; use another model"
        )
    if "classifier/kernel" in shapes and any(name.startswith("fit_dense") for name in surplus):
        raise ValueError(
            f"{model.folder}: expected a linear head over the pooled token, got one of the "
            "released TinyBERT code, which has a ReLU before it: its logits would differ; "
            "fine-tune the encoder with a finetune section instead"
        )
    broken = [p for p in missing if p.startswith(("encoder/embeddings", "encoder/layers"))]
    if broken:
        raise ValueError(
            f"{model.folder}: expected all weights of a {form.class_prefix}, its weights lack "
            f"{broken[:4]}{' …' if len(broken) > 4 else ''}; found {sorted(model.tensors)[:4]} …; "
            "use another folder"
        )
    if missing:
        initial = flatten(init())
        flat |= {path: np.asarray(initial[path]) for path in missing}
    return Loaded(unflatten({path: flat[path] for path in shapes}), missing, surplus)


def _head_fits(model: HfModel, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the folder's head has the kind and size of `shapes`; True if either has no head."""
    wanted = head_part(shapes)
    if head_tensor(model.tensors) is None or wanted is None:
        return True
    assert model.head is not None
    num_outputs = shapes[f"{wanted}/kernel"][-1]
    fits = num_outputs == len(model.head.label_names)
    return fits and model.head.kind == wanted_head(shapes)


def convert_params(model: HfModel, shapes: Mapping[str, tuple[int, ...]]) -> Conversion:
    """`from_hf` of the folder's tensors; a ValueError starts with the name of the folder."""
    try:
        return from_hf(format_of(model.config.model_type), model.tensors, shapes)
    except ValueError as error:
        raise ValueError(f"{model.folder}: {error}") from None


def check_start(
    path: str | Path, init: Callable[[Any], Mapping[str, Any]], *, whole: bool = False
) -> None:
    """Raises the ValueError that `start_params` would raise, without making an array."""
    import jax

    abstract = jax.eval_shape(init, jax.random.key(0))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    _missing_weights(path, _load_start(path, abstract, lambda: empty, whole), whole)


def start_params(
    path: str | Path | None,
    init: Callable[[Any], Mapping[str, Any]],
    key: Any = None,
    *,
    whole: bool = False,
    label_names: tuple[str, ...] | None = None,
    is_quiet: bool = False,
) -> dict[str, Any]:
    """Initial parameters of a stage: the weights of a folder or hub id; without path, `init(key)`.

    Weights that the folder lacks come from `init(key)`. So does a head of another kind, with other
    labels than `label_names` or another number of labels. Messages name weights that are new or
    left out, but not with `is_quiet`. `whole`: raises ValueError for such a head and for missing
    weights, except those of a pooler that no classifier reads.
    """
    import jax

    key = jax.random.key(0) if key is None else key
    fresh = jax.jit(init)
    if path is None:
        return fresh(key)
    loaded = _load_start(path, jax.eval_shape(init, key), lambda: fresh(key), whole, label_names)
    missing = _missing_weights(path, loaded, whole)
    is_quiet = is_quiet or not processes.is_main()
    for line in () if is_quiet else _differences(loaded, missing):
        print(f"{path}: {line}", flush=True)
    return loaded.params


# Heads of pretraining (BERT, DistilBERT), poolers and heads of tasks, in transformers.
_NOT_MISSED = ("cls.", "vocab_", "pooler.", "bert.pooler.", "pre_classifier.")
_HEADS = ("classifier.", "qa_outputs.")


def _differences(loaded: Loaded, missing: list[str]) -> Iterator[str]:
    """What a folder and the model that starts from it do not share, where it matters."""
    part = head_part(flatten(loaded.params))
    is_new = part is not None and f"{part}/kernel" in missing
    own = [name for name in loaded.surplus if name.startswith(_HEADS)]
    if is_new:
        yield f"its encoder, with a new head{' in place of its own' if own else ''}"
    if rest := [name for name in missing if not (is_new and name.startswith(f"{part}/"))]:
        yield f"no weights for {', '.join(rest)}: these start anew"
    # `header` refuses names that a terminal would obey.
    if names := ", ".join(n for n in loaded.surplus if not n.startswith(_NOT_MISSED + _HEADS)):
        yield f"left out, as this model has no place for them: {names}"


def _load_start(
    path: str | Path,
    abstract: Mapping[str, Any],
    init: Callable[[], Mapping[str, Any]],
    whole: bool,
    label_names: tuple[str, ...] | None = None,
) -> Loaded:
    model = read_model(path)
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(abstract).items()}
    trained = model.head.label_names if model.head else None
    is_any = trained is None or label_names is None or is_unnamed(trained)
    if whole or _head_fits(model, shapes) and (is_any or trained == label_names):
        return load_params(model, abstract, init)
    kernel = head_tensor(model.tensors)
    prefix = kernel.removesuffix("weight") if kernel else None
    head = [name for name in model.tensors if prefix and name.startswith(prefix)]
    loaded = load_params(model._replace(tensors=model.tensors.without(head)), abstract, init)
    return loaded._replace(surplus=(*loaded.surplus, *head))


def _missing_weights(path: str | Path, loaded: Loaded, whole: bool) -> list[str]:
    """Paths without weights, except a pooler that no head reads; with `whole` raises ValueError."""
    has_head = head_part(flatten(loaded.params)) is not None
    optional = () if has_head else ("encoder/pooler", "pooler")
    missing = [name for name in loaded.missing if not name.startswith(optional)]
    if whole and missing:
        fix = "that is fine-tuned on the task (finetune section)"
        if not has_head:
            fix = (
                "that was saved with its masked-LM head, or add a pretrain section (it trains the "
                "head), or set another objective (distillation.general)"
            )
        raise ValueError(
            f"{path}: expected trained weights for {missing}, got none; use a folder {fix}"
        )
    return missing


def save_model(
    folder: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Any,
    *,
    head: Head | None = None,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Writes a folder that `AutoModel….from_pretrained` loads, then reads it back and compares.

    `params`: an encoder with or without a head. `extra`: functions that write more files, by file
    name. The folder appears complete or not at all: it is written under another name and then
    renamed. An earlier save is replaced; it does not change if this one fails. Raises ValueError
    where `folder` holds other files, which would be lost.
    """
    from safetensors.numpy import save_file

    folder = Path(os.path.expanduser(folder))
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    if "embeddings/word/embedding" in flat:
        flat = {f"encoder/{path}": leaf for path, leaf in flat.items()}
    form = format_of(config.model_type)
    if not form.holds_pooler(head.kind if head else None):
        flat = {path: leaf for path, leaf in flat.items() if "/pooler/" not in path}
    settings = write_config(form, flat, config, head)

    def write(partial: Path) -> None:
        save_tokenizer(tokenizer, partial, config)
        write_json(partial / CONFIG, settings)
        save_file(to_hf(form, flat), str(partial / WEIGHTS), metadata={"format": "pt"})
        for name, write_extra in (extra or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            write_extra(partial / name)

    return write_folder(folder, write, lambda partial: _compare(partial, flat, config))


def write_folder(
    folder: Path, write: Callable[[Path], None], check: Callable[[Path], None]
) -> Path:
    """Makes a folder that appears complete or not at all: `write` fills it, `check` reads it back.

    See `save_model`.
    """
    _make_parent(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        partial = Path(scratch) / "new"
        partial.mkdir()
        write(partial)
        # safetensors writes files that only the owner can read.
        mode = (partial / CONFIG).stat().st_mode
        for file in (path for path in partial.rglob("*") if path.is_file()):
            file.chmod(mode)
        check(partial)
        _replace(folder, partial)
    return folder


def write_json(file: Path, tree: Any) -> None:
    """Writes a tree of plain values."""
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _make_parent(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{folder}: expected a folder to write, but {path} is a file; choose another"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)


def _replace(folder: Path, new: Path) -> None:
    """Renames `new` to `folder`; if that fails, the earlier `folder` stays or is put back."""
    if not folder.exists():
        new.rename(folder)
        return
    lost = sorted({p.name for p in folder.iterdir()} - {p.name for p in new.iterdir()})
    if lost:
        raise ValueError(
            f"{folder}: expected an empty folder or an earlier save, got one with {lost[:4]}"
            f"{' …' if len(lost) > 4 else ''}, which would be lost; choose another folder"
        )
    old = new.with_name("old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise


def _compare(folder: Path, flat: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Reads a folder back; raises ValueError where it differs from what was saved."""
    held = {path: leaf.shape for path, leaf in flat.items()}
    shapes = config_shapes(format_of(config.model_type), config, held)
    model = read_model(folder)
    again = convert_params(model, shapes)
    same = model.config == config and not again.missing and not again.surplus
    if not same or any(not np.array_equal(again.flat[path], leaf) for path, leaf in flat.items()):
        raise ValueError(
            f"{folder}: the saved weights or sizes differ when read back; check the disk"
        )
