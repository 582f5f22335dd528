"""The settings of devices, dtypes and attention. Imports no JAX."""

from typing import Literal

from pydantic import Field

from tinybert_jax.settings.section import (
    AttentionBackend,
    ComputeDtype,
    FrozenDtype,
    PositiveInt,
    Section,
)


class MeshSection(Section):
    """Number of devices along each mesh axis; an axis of -1 takes all remaining devices."""

    data: int = Field(default=-1, description="parts of the batch; the weights are copied")
    fsdp: PositiveInt = Field(
        default=1, description="parts of the batch, of the weights and of the optimizer's state"
    )
    tensor: PositiveInt = Field(default=1, description="parts of the matrices of a layer")
    dcn_data: PositiveInt | None = Field(
        default=None,
        description="slices of TPUs, or other groups with a slow network between them, that data "
        "runs over; fsdp and tensor stay within one; default: as many as the devices are in",
    )


class ComputeSection(Section):
    """Dtypes, the layout of the layers, and the attention backend."""

    dtype: ComputeDtype = Field(
        default="float32",
        description="dtype of all activations; bfloat16_products: fp32, but the products with the "
        "weights of layers and vocabulary round their inputs to bfloat16, which is fast on CPUs "
        "with bfloat16 instructions",
    )
    teacher_dtype: FrozenDtype | None = Field(
        default=None,
        description="dtype of frozen teachers; default: dtype; int8_products: fp32, but the "
        "products with the weights of layers are int8, with one scale per token and per column; "
        "float8_products: bfloat16, but these products are float8 (e4m3), whose inputs are cut to "
        "±112, for H100 and newer GPUs",
    )
    unroll_layers: bool | Literal["auto"] = Field(
        default="auto",
        description="compile every layer, not a loop: faster, and more to compile; auto: on GPUs "
        "and TPUs, not on CPUs. A run that goes on keeps the form it began with",
    )
    attention: AttentionBackend = Field(
        default="auto",
        description="cudnn (NVIDIA GPUs, bfloat16) and splash (TPUs) are flash attention for rows "
        "of a multiple of 128 tokens, without attention dropout; auto: cudnn where it is possible, "
        "else xla; triton (NVIDIA GPUs, bfloat16, heads of at most 64 dims): cudnn where it is "
        "possible, else a kernel of this package, for rows of any length and with dropout, and one "
        "for the term attention. A last layer that is computed at few tokens uses xla",
    )

    @property
    def frozen_dtype(self) -> FrozenDtype:
        """The dtype of a model that is not trained, such as a teacher."""
        return self.teacher_dtype or self.dtype
