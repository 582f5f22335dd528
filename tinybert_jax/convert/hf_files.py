"""Reads and writes Hugging Face model folders: config.json, safetensors, tokenizer files.

Only safetensors are read: no pickle is ever opened and no code from a folder is run.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from tinybert_jax.convert import hf_map
from tinybert_jax.sections import ModelConfig
from tinybert_jax.tree import flatten, unflatten

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


class HfModel(NamedTuple):
    """A model folder as read: sizes, label names in id order (or None), and raw tensors."""

    folder: Path
    config: ModelConfig
    label_names: tuple[str, ...] | None
    problem_type: str | None
    tensors: dict[str, np.ndarray]


class Loaded(NamedTuple):
    params: dict[str, Any]
    missing: tuple[str, ...]  # paths that kept their initial values
    surplus: tuple[str, ...]  # names in the folder without a place in the model


def read_model(path: str | Path) -> HfModel:
    """Reads and checks a local folder or a hub id; touches no device."""
    folder = find_folder(path)
    raw = _read_json(folder / "config.json")
    return HfModel(
        folder=folder,
        config=_model_config(raw, folder),
        label_names=_label_names(raw),
        problem_type=raw.get("problem_type"),
        tensors=_read_tensors(folder),
    )


def has_classifier(path: str | Path) -> bool:
    return "classifier.weight" in read_model(path).tensors


def load_params(
    model: HfModel, abstract: Mapping[str, Any], init: Callable[[], Mapping[str, Any]]
) -> Loaded:
    """Parameters of the given abstract tree; what the folder lacks comes from `init()`.

    The encoder has to be complete except for the pooler; heads may be missing (reported).
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    if "embeddings/word/embedding" in shapes:  # a bare encoder
        whole = load_params(model, {"encoder": abstract}, lambda: {"encoder": init()})
        return whole._replace(params=whole.params["encoder"])
    tensors = model.tensors
    head = tensors.get("classifier.weight")
    if head is not None and shapes.get("classifier/kernel", head.T.shape) != head.T.shape:
        raise ValueError(
            f"{model.folder}: expected a head with {shapes['classifier/kernel'][1]} labels, "
            f"got one with {head.shape[0]}: {list(model.label_names or ())}"
        )
    flat, missing, surplus = hf_map.from_hf(tensors, shapes)
    broken = [p for p in missing if p.startswith(("encoder/embeddings", "encoder/layers"))]
    if broken:
        raise ValueError(
            f"{model.folder}: expected a BERT checkpoint, its weights lack {broken[:4]}"
            f"{' …' if len(broken) > 4 else ''}; found {sorted(tensors)[:4]} …"
        )
    if missing:
        initial = flatten(init())
        flat |= {path: np.asarray(initial[path]) for path in missing}
    return Loaded(unflatten({path: flat[path] for path in shapes}), missing, surplus)


def start_params(
    path: str | Path | None,
    init: Callable[[Any], Mapping[str, Any]],
    key: Any = None,
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """What a stage starts from: a folder's weights, fresh where it has none; no path: `init(key)`.

    A head of another task (labels that do not fit) is refused. `whole`: missing weights are
    refused too, except the pooler's.
    """
    import jax

    key = jax.random.key(0) if key is None else key
    fresh = jax.jit(init)
    if path is None:
        return fresh(key)
    loaded = load_params(read_model(path), jax.eval_shape(init, key), lambda: fresh(key))
    absent = [p for p in loaded.missing if not p.startswith(("encoder/pooler", "pooler"))]
    if whole and absent:
        raise ValueError(f"{path}: expected trained weights for {absent}, the folder has none")
    if absent:
        print(f"{path}: no weights for {', '.join(absent)}: they start fresh", flush=True)
    return loaded.params


def save_model(
    folder: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Any,
    *,
    label_names: tuple[str, ...] | None = None,
    regression: bool = False,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Writes a folder that `AutoModel….from_pretrained` loads, then reads it back and compares.

    `params` is a bare encoder or one with a head. `extra` writes further files by name. The
    folder appears whole or not at all: it is written beside its place and renamed.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    if "embeddings/word/embedding" in flat:
        flat = {f"encoder/{path}": leaf for path, leaf in flat.items()}
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    tokenizer.save_pretrained(str(partial))
    settings = _config_json(flat, config, label_names, regression)
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(hf_map.to_hf(flat), str(partial / _WEIGHTS), metadata={"format": "pt"})
    for name, write in (extra or {}).items():
        write(partial / name)
    os.chmod(partial, 0o755)
    _compare(partial, flat, config)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a folder; raises ValueError where the folder has none."""
    from transformers import AutoTokenizer

    folder = find_folder(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(
            f"{folder}: expected tokenizer.json or vocab.txt, found neither; "
            "copy the tokenizer files into the folder or set tokenizer.path"
        )
    if not (folder / "tokenizer.json").is_file():
        from transformers import BertTokenizer

        return BertTokenizer.from_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder), use_fast=True)


def find_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id through the hub's cache (safetensors and text only)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    is_hub_id = str(path).count("/") <= 1 and not str(path).startswith((".", "/", "~"))
    if not is_hub_id:
        raise ValueError(f"{path}: expected a Hugging Face model folder, found none")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "vocab.txt"])
        )
    except Exception as error:  # the hub's many network errors, retold with what to do
        raise ValueError(
            f"'{path}': expected a local model folder or a hub id; no such folder, and the hub "
            f"could not be read ({type(error).__name__})"
        ) from error


def _model_config(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    kind = raw.get("model_type", "bert")  # the released TinyBERT folders have none
    if kind != "bert":
        raise ValueError(f"{folder}: expected model_type 'bert', got '{kind}'")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{folder}: expected absolute positions, got '{raw['position_embedding_type']}'"
        )
    if raw.get("auto_map") or raw.get("quantization_config"):
        raise ValueError(f"{folder}: refusing auto_map and quantization_config in config.json")
    known = {name: raw[name] for name in ModelConfig.model_fields if raw.get(name) is not None}
    try:
        return ModelConfig(**known)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{folder / 'config.json'}: {details}") from None


def _label_names(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = raw.get("id2label")
    if not names:
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _config_json(
    flat: Mapping[str, Any],
    config: ModelConfig,
    label_names: tuple[str, ...] | None,
    regression: bool,
) -> dict[str, Any]:
    has_head = "classifier/kernel" in flat
    architecture = (
        "BertForSequenceClassification"
        if has_head
        else "BertForMaskedLM"
        if "decoder/bias" in flat
        else "BertModel"
    )
    settings = {"architectures": [architecture], "model_type": "bert", **config.model_dump()}
    settings |= {"dtype": "float32", "tie_word_embeddings": True}
    if has_head:
        names = label_names or ("LABEL_0",)
        settings["id2label"] = {str(i): name for i, name in enumerate(names)}
        settings["label2id"] = {name: i for i, name in enumerate(names)}
        settings["problem_type"] = "regression" if regression else "single_label_classification"
    return settings


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / _INDEX
    if not index.is_file():
        return _read_file(folder / _WEIGHTS)
    weight_map = _read_json(index).get("weight_map", {})
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: expected plain .safetensors file names, got '{name}'")
        part = _read_file(folder / name)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if set(part) != expected:
            difference = sorted(set(part) ^ expected)[:4]
            raise ValueError(f"{folder / name}: does not fit its index, differs in {difference}")
        tensors |= part
    return tensors


def _read_file(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        others = sorted(p.name for p in file.parent.glob("*.bin"))
        hint = f"; {others} holds pickles, which are not read: convert it" if others else ""
        raise ValueError(f"{file.parent}: expected {file.name}, found none{hint}")
    try:
        with safe_open(str(file), framework="numpy") as opened:
            return {name: _as_float32(opened, name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got: {error}") from error


def _as_float32(opened: Any, name: str) -> np.ndarray:
    """bfloat16 and float16 widen to fp32 without loss; integer buffers stay."""
    array = opened.get_tensor(name)
    is_integer = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
    return array if is_integer else array.astype(np.float32)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent}: expected {file.name}, found none")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _compare(folder: Path, flat: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    model = read_model(folder)
    again = hf_map.from_hf(model.tensors, shapes).flat
    same = model.config == config and all(
        path in again and np.array_equal(again[path], leaf) for path, leaf in flat.items()
    )
    if not same:
        raise ValueError(f"{folder}: what was read back differs from what was saved")
