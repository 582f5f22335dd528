"""Parameters, FLOPs and device peaks against papers, data sheets, torch and our own arrays."""

import subprocess
import sys

import jax
import pytest
from transformers import BertConfig, BertForMaskedLM, BertModel

from tinybert_jax.models.heads import make_encoder
from tinybert_jax.models.params import num_parameters as num_array_elements
from tinybert_jax.performance.device_peaks import measure_gemm_peak, peak_flops
from tinybert_jax.performance.flops import (
    forward_flops_per_token,
    masked_lm_flops,
    num_encoder_parameters,
    num_parameters,
    training_flops_per_token,
)
from tinybert_jax.settings.sizes import PRESETS, ModelConfig

BERT_BASE = BertConfig()
TINYBERT4 = BertConfig(hidden_size=312, num_hidden_layers=4, intermediate_size=1200)
TINYBERT6 = BertConfig(num_hidden_layers=6)


@pytest.mark.parametrize(
    "config, expected",
    [(BERT_BASE, 109_482_240), (TINYBERT4, 14_350_248), (TINYBERT6, 66_955_008)],
)
def test_num_parameters_equals_the_published_number(config, expected):
    assert num_parameters(config) == expected


@pytest.mark.parametrize("pooler", [True, False])
def test_num_parameters_equals_the_number_in_a_torch_model(pooler):
    config = BertConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=19,
        type_vocab_size=3,
    )
    model = BertModel(config, add_pooling_layer=pooler)
    assert num_parameters(config, pooler=pooler) == sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert num_encoder_parameters(config) == encoder


def test_flops_of_general_distillation():
    # Per token at 128 tokens: teacher forward 174.6 M, student 36.4 M, together 211.0 M.
    assert forward_flops_per_token(BERT_BASE, 128) == pytest.approx(174.6e6, abs=0.05e6)
    student = 3 * forward_flops_per_token(TINYBERT4, 128, projection_dim=768)
    assert student == pytest.approx(36.4e6, abs=0.05e6)
    step = training_flops_per_token([TINYBERT4], 128, projection_dim=768, teacher=BERT_BASE)
    assert step == pytest.approx(211.0e6, abs=0.05e6)


def test_flops_count_every_matrix_product_of_a_forward_pass():
    """Against torch's FLOP counter; eager attention, so that it counts both attention products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    batch, seq_len = 2, 16
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=56,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(batch, seq_len, dtype=torch.long))
    counted = counter.get_total_flops()
    assert counted == batch * seq_len * forward_flops_per_token(config, seq_len)


def test_flops_of_the_masked_lm_head_equal_those_counted_in_torch():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 56}
    config = BertConfig(**sizes, num_attention_heads=4, attn_implementation="eager")
    model = BertForMaskedLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 16, dtype=torch.long))
    encoder = 2 * 16 * forward_flops_per_token(config, 16)
    assert counter.get_total_flops() == encoder + masked_lm_flops(config, 2 * 16, 2 * 16)
    assert masked_lm_flops(config, 7, 3) == 2 * (7 * 24 * 24 + 3 * 24 * 50)


def test_training_costs_three_forward_passes():
    forward = forward_flops_per_token(TINYBERT6, 64)
    assert training_flops_per_token([TINYBERT6], 64) == 3 * forward


@pytest.mark.parametrize(
    "device_kind, million_tokens",
    [("NVIDIA H200", 4.69), ("TPU v5 lite", 0.93), ("TPU v5", 2.18), ("TPU v6 lite", 4.35)],
)
def test_peaks_bound_the_tokens_per_second_of_general_distillation(device_kind, million_tokens):
    flops = training_flops_per_token([TINYBERT4], 128, projection_dim=768, teacher=BERT_BASE)
    ceiling = peak_flops(device_kind, "bfloat16") / flops
    assert ceiling == pytest.approx(million_tokens * 1e6, abs=0.005e6)


@pytest.mark.parametrize(
    "device_kind, dtype, tflops",
    [
        ("TPU v4", "bfloat16", 275.0),
        ("TPU v5p", "bfloat16", 459.0),
        ("TPU7x", "bfloat16", 1153.5),
        ("TPU v5e", "float32", 197.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA L4", "float16", 121.0),
        ("Tesla T4", "float16", 65.0),
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("Tesla V100-PCIE-32GB", "float16", 112.0),
    ],
)
def test_peak_by_device_kind(device_kind, dtype, tflops):
    assert peak_flops(device_kind, dtype) == tflops * 1e12


@pytest.mark.parametrize(
    "device_kind, dtype",
    [
        ("cpu", "float32"),
        ("NVIDIA L40S", "bfloat16"),
        ("NVIDIA GH200 480GB", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("TPU v5 lite", "int4"),
    ],
)
def test_an_unknown_peak_is_none(device_kind, dtype):
    assert peak_flops(device_kind, dtype) is None


def test_peak_flops_takes_a_dtype_as_string_scalar_type_or_dtype():
    import jax.numpy as jnp
    import numpy as np

    kind = "NVIDIA H100 80GB HBM3"
    for name in ("bfloat16", "float32"):
        spellings = (name, getattr(jnp, name), jnp.dtype(name))
        assert {peak_flops(kind, d) for d in spellings} == {peak_flops(kind, name)}
    assert peak_flops(kind, np.float32) == peak_flops(kind, "float32")


def test_measured_gemm_peak_is_plausible():
    assert 1e9 < measure_gemm_peak(budget_s=0.1) < 1e14


@pytest.mark.parametrize("module", ["flops", "device_peaks", "host"])
def test_importing_does_not_import_jax(module):
    code = f"import sys, tinybert_jax.performance.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("bert-base", 109_482_240),
        ("tinybert-4l-312d", 14_350_248),
        ("tinybert-6l-768d", 66_955_008),
        ("bert-tiny", 4.4e6),
        ("bert-mini", 11.2e6),
        ("bert-small", 28.8e6),
        ("bert-medium", 41.4e6),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters):
    """The sizes of the four BERT miniatures are published in millions with one decimal."""
    rounding = 0 if isinstance(parameters, int) else 0.05e6
    assert abs(num_parameters(ModelConfig(**PRESETS[preset])) - parameters) <= rounding


@pytest.mark.parametrize("preset", PRESETS)
def test_num_parameters_equals_the_arrays_of_a_preset(preset):
    config = ModelConfig(**PRESETS[preset])
    abstract = jax.eval_shape(make_encoder(config)[1], jax.random.key(0))
    assert num_array_elements(abstract) == num_parameters(config)
