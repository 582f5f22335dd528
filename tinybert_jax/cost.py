"""Owns the arithmetic of model size and speed: parameters, FLOPs and what the hardware can do.

Plain Python: jax is imported only by `measure_gemm_peak`, so launchers and --help stay instant.
A FLOP count is two per multiply-add of the matrix products; softmax, LayerNorm, GELU, biases and
the embedding look-up are left out, as in every published model-FLOPs-utilisation figure.
"""

import functools
import re
import time
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class BertShape(Protocol):
    """The size fields of a BERT under Hugging Face's `BertConfig` names."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...


def num_parameters(config: BertShape, *, pooler: bool = True) -> int:
    """All parameters without a task head: embeddings, layers and (by default) the pooler.

    BERT-base (arXiv 1810.04805) 109,482,240, TinyBERT4 (arXiv 1909.10351) 14,350,248.
    """
    d = config.hidden_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    embeddings = rows * d + 2 * d
    return embeddings + num_encoder_parameters(config) + (d * d + d if pooler else 0)


def num_encoder_parameters(config: BertShape) -> int:
    """Parameters of the layers alone: what sets the speed, since an embedding is a look-up."""
    d, f = config.hidden_size, config.intermediate_size
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * f + f + d
    layer_norms = 4 * d
    return config.num_hidden_layers * (attention + feed_forward + layer_norms)


def forward_flops_per_token(
    config: BertShape, seq_len: int, *, projection_dim: int = 0, num_read: int | None = None
) -> float:
    """FLOPs of one forward pass divided by its tokens, padding counted as tokens.

    Counts the six weight matrices of a layer and the two products of attention (scores, and
    probabilities times values: 2·seq_len·hidden_size multiply-adds per token). No task head.
    `projection_dim` adds the student's share of hidden-state distillation: every entry of `hidden`
    (num_hidden_layers + 1) projected to a teacher of that width. `num_read`: at how many tokens of
    a row the last layer runs, but for its keys and values; default: at every one.

    At T = 128: BERT-base 174.6 M; TinyBERT4 9.7 M, and 12.1 M with projection_dim=768, a third of
    the 36.4 M of a trained token.
    """
    d, f, num_layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = 4 * d * d + 2 * d * f + 2 * seq_len * d
    projection = projection_flops_per_token(config, projection_dim, num_layers + 1)
    share_left_out = 0 if num_read is None else 1 - num_read / seq_len
    left_out = share_left_out * (layer - 2 * d * d)
    return float(2 * (num_layers * layer - left_out) + projection)


def projection_flops_per_token(config: BertShape, projection_dim: int, num_entries: int) -> int:
    """FLOPs of mapping so many entries of a student's `hidden` to its teacher's width, forward."""
    return 2 * num_entries * config.hidden_size * projection_dim


def masked_lm_flops(config: BertShape, num_mapped: int, num_predicted: int) -> int:
    """FLOPs of the masked-LM head of a batch, forward.

    Its dense map runs at `num_mapped` tokens, the product with the word table at `num_predicted`.
    """
    d = config.hidden_size
    return 2 * d * (num_mapped * d + num_predicted * config.vocab_size)


def training_flops_per_token(
    trained: Iterable[BertShape],
    seq_len: int,
    *,
    projection_dim: int = 0,
    teacher: BertShape | None = None,
    num_read: int | None = None,
) -> float:
    """FLOPs of one training step per token: three forward passes of each model, one of a teacher.

    All read the same batch and share the teacher's pass, if there is one; `num_read` as above.
    The backward pass costs two forward passes: a gradient for the weights and one for the inputs.
    Recomputation (remat) is not counted: it is a cost of the machine, not of the model.
    """
    forward = sum(
        forward_flops_per_token(config, seq_len, projection_dim=projection_dim, num_read=num_read)
        for config in trained
    )
    taught = forward_flops_per_token(teacher, seq_len, num_read=num_read) if teacher else 0
    return float(3 * forward + taught)


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Dense FLOP/s one device can reach, by `jax.Device.device_kind`; None where unknown.

    `dtype` is float32, bfloat16 or float16, as a string or a numpy/jax dtype. float32 means what
    XLA runs for float32 operands at default precision: TF32 on Ampere and later, one bfloat16
    pass on TPU. A MIG slice and a CPU have no entry (for a CPU: `measure_gemm_peak`).
    A "TPU7x" device is half a chip (one of two chiplets), a "TPU v4" or "v5p" one a whole chip.

    Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x system architecture), agreeing
    with jax/_src/pallas/mosaic/tpu_info.py; NVIDIA data sheets for V100, T4, A100, L4, H100 and
    H200, halved where they quote structured sparsity.
    """
    if "MIG" in device_kind.split():
        return None
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    for pattern, peaks in _PEAK_TFLOPS:
        if re.search(pattern, device_kind):
            tflops = peaks.get(name)
            return None if tflops is None else tflops * 1e12
    return None


def _tpu(tflops: float) -> dict[str, float]:
    return {"bfloat16": tflops, "float32": tflops}


def _gpu(half: float, tf32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "float32": tf32}


# First match wins, so a variant stands before its family.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"^TPU v4$", _tpu(275.0)),
    (r"^TPU v5( lite|e)$", _tpu(197.0)),
    (r"^TPU v5p?$", _tpu(459.0)),
    (r"^TPU v6( lite|e)$", _tpu(918.0)),
    (r"^TPU ?7x$", _tpu(2307.0 / 2)),
    (r"\bH(100|200) NVL\b", _gpu(835.5, 417.7)),
    (r"\bH100 PCIe\b", _gpu(756.0, 378.0)),
    (r"\bH(100|200)\b", _gpu(989.4, 494.7)),
    (r"\bA100\b", _gpu(312.0, 156.0)),
    (r"\bL4\b", _gpu(121.0, 60.5)),
    (r"\bT4\b", {"float16": 65.0, "float32": 8.1}),
    (r"\bV100S?-PCIE\b", {"float16": 112.0, "float32": 14.0}),
    (r"\bV100\b", {"float16": 125.0, "float32": 15.7}),
)


def measure_gemm_peak(dtype: str = "float32", budget_s: float = 0.5) -> float:
    """FLOP/s of a jitted matrix product on this CPU, accumulated in fp32, the best of a few tries.

    The shape (2048×768 times 768×3072) is a BERT-base feed-forward. Other load on the machine
    lowers the figure, so that utilisation may come out above 1 when the load ends. `budget_s`
    bounds the tries, not the one compile.
    """
    import jax
    import jax.numpy as jnp

    rows, inner, columns = 2048, 768, 3072
    with jax.default_device(jax.devices("cpu")[0]):
        left = jnp.full((rows, inner), 0.5, dtype)
        right = jnp.full((inner, columns), 0.5, dtype)
        multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        multiply(left, right).block_until_ready()
        deadline = time.perf_counter() + budget_s
        best = float("inf")
        while best == float("inf") or time.perf_counter() < deadline:
            start = time.perf_counter()
            multiply(left, right).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best
