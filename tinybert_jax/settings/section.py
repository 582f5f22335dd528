"""What every configuration section is made of: the base class and the kinds of values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositionInit = Literal["normal", "sinusoid"]
ComputeDtype = Literal["float32", "bfloat16", "bfloat16_products"]
FrozenDtype = Literal[ComputeDtype, "int8_products", "float8_products"]
Pooling = Literal["mean", "first"]
AttentionBackend = Literal["auto", "xla", "cudnn", "triton", "splash"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
