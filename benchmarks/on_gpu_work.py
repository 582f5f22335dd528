"""What benchmarks/on_gpu.py trains, how it is run, and what it costs; the same for all sides."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import sides

MASK_RATE, MASK_TOKEN_ID, SPECIAL_TOKEN_IDS = 0.15, 103, (0, 101, 102, 103)
FIRST_WORD_ID, NUM_BATCHES = 1000, 4


class Work(NamedTuple):
    """What one measure trains, and on what."""

    kind: str  # distill or mlm
    student: dict[str, int]  # sizes under BertConfig's names; of mlm the only model
    teacher: dict[str, int] | None
    width: int
    batch_size: int


class Settings(NamedTuple):
    """How every side runs it."""

    num_steps: int
    num_rounds: int
    chunk_size: int  # predictions whose logits our masked LM makes at one time
    unrolled: bool  # our layers one by one, not as a loop: compiles for minutes
    tiny: bool  # any device, no torch.compile


class Ready(NamedTuple):
    """A side that is set up: what to time, and what to ask it afterwards."""

    run: sides.Round
    device: Callable[[], tuple[str, int | None]]  # its name, the most bytes that it ever held
    note: str = ""


def make_measures(tiny: bool) -> dict[str, Work]:
    from tinybert_jax.settings.sizes import PRESETS

    student, base = PRESETS["tinybert-4l-312d"], PRESETS["bert-base"]
    widths, rows = (128, 512), (256, 64)
    if tiny:
        student = _tiny_sizes(num_hidden_layers=2, hidden_size=24)
        base = _tiny_sizes(num_hidden_layers=4, hidden_size=48)
        widths, rows = (16, 32), (4, 4)
    return {
        f"distill T={widths[0]}": Work("distill", student, base, widths[0], rows[0]),
        "mlm tinybert-4l-312d": Work("mlm", student, None, widths[0], rows[0]),
        f"distill T={widths[1]}": Work("distill", student, base, widths[1], rows[1]),
        "mlm bert-base": Work("mlm", base, None, widths[0], rows[0]),
    }


def _tiny_sizes(**sizes: int) -> dict[str, int]:
    return sizes | {"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 1200}


def flops_per_slot(work: Work, chunk_size: int) -> float:
    """As `plan` counts a stage: the masked-LM head at its slots and, in whole chunks, its words."""
    from tinybert_jax.objectives import masking
    from tinybert_jax.objectives.masked_lm import mlm_chunk_size
    from tinybert_jax.performance import flops
    from tinybert_jax.settings.sizes import ModelConfig

    student = ModelConfig(**work.student)
    if work.teacher:
        teacher = ModelConfig(**work.teacher)
        return flops.training_flops_per_token(
            [student], work.width, projection_dim=teacher.hidden_size, teacher=teacher
        )
    num_slots = work.batch_size * work.width
    num_picked = work.batch_size * masking.num_slots(MASK_RATE, work.width)
    chunk_size = mlm_chunk_size(num_slots, chunk_size, mask_rate=MASK_RATE)
    num_predicted = chunk_size * math.ceil(MASK_RATE * num_slots / chunk_size)
    head = flops.masked_lm_flops(student, num_picked, num_predicted) / num_slots
    needed = masking.num_slots(MASK_RATE, work.width)  # tokens whose last layer is needed
    forward = flops.forward_flops_per_token(student, work.width, num_last_layer_tokens=needed)
    return 3 * (forward + head)


def token_ids(work: Work) -> list[np.ndarray]:
    """int32 [batch, seq], `NUM_BATCHES` of them; the same for all sides."""
    generator = np.random.default_rng(0)
    shape, end = (work.batch_size, work.width), work.student.get("vocab_size", 30522)
    return [
        generator.integers(FIRST_WORD_ID, end, shape, dtype=np.int32) for _ in range(NUM_BATCHES)
    ]
