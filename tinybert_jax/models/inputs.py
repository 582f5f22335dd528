"""What encoders read beside the attention mask, by kind of input."""

from typing import NamedTuple

import jax


class Text(NamedTuple):
    """Tokens; `token_type_ids` tell the second text of a pair from the first."""

    input_ids: jax.Array  # int32 [batch, seq]
    token_type_ids: jax.Array  # int32 [batch, seq]
