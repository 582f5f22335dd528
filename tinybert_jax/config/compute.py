"""The settings of where and in which numbers a run computes.

Imports no JAX, as all sections.
"""

from pydantic import Field

from tinybert_jax.settings.section import (
    AttentionBackend,
    ComputeDtype,
    FrozenDtype,
    PositiveInt,
    Section,
)


class MeshSection(Section):
    """Devices along each mesh axis; one axis may be -1: all that are left."""

    data: int = -1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1


class ComputeSection(Section):
    dtype: ComputeDtype = Field(
        default="float32",
        description="of all activations; bfloat16_products: fp32, only the products with weights "
        "of layers and vocabulary read bfloat16: fast on CPUs with bfloat16 instructions",
    )
    teacher_dtype: FrozenDtype | None = Field(
        default=None,
        description="of teachers that distillation reads; default: dtype; int8_products: fp32, "
        "only the products with weights of layers are of int8, with a scale a token and a column",
    )
    unroll_layers: bool = False
    attention: AttentionBackend = Field(
        default="auto",
        description="flash attention by cudnn (NVIDIA GPUs, bfloat16) or splash (TPUs): for rows "
        "of a multiple of 128 tokens, without dropout of attention; auto: cudnn where it can be. "
        "A last layer of which heads read few tokens takes xla for those",
    )

    @property
    def frozen_dtype(self) -> FrozenDtype:
        """Of a model that is only read: a teacher."""
        return self.teacher_dtype or self.dtype
