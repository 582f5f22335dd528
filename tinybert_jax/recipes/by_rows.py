"""Measures what the recipe `config.by_rows` has to know of a run's text and teacher."""

import jax

from tinybert_jax.config.by_rows import Facts
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.tasks import TaskSection
from tinybert_jax.data.splits import read_task
from tinybert_jax.huggingface.folder import read_model
from tinybert_jax.performance import host
from tinybert_jax.settings.section import ComputeDtype
from tinybert_jax.tasks.table import TASKS


def measure(draft: RunConfig, platform: str | None = None) -> Facts | None:
    """The facts of a config that has all its sections; `platform`: of JAX, None: that of this run.

    None where text or teacher cannot be read: the run itself then reports all inputs that cannot
    be read, together.
    """
    try:
        task = draft.task and read_task(_unselected(draft.task), TASKS[draft.task.kind].read)
        path = draft.teacher.finetuned or draft.teacher.path
        teacher = read_model(path).config.model_dump() if path else draft.teacher.sizes()
    except ValueError:
        return None
    if task is None:
        return None
    return Facts(
        num_labelled=len(task.train.text),
        num_unlabelled=len(task.unlabelled.text) if task.unlabelled else 0,
        hidden_size=teacher["hidden_size"],
        num_layers=teacher["num_hidden_layers"],
        num_heads=teacher["num_attention_heads"],
        fast_dtype=_fast_dtype(platform or jax.default_backend()),
        intermediate_size=teacher["intermediate_size"],
        num_positions=teacher.get("max_position_embeddings"),
    )


def _unselected(section: TaskSection) -> TaskSection:
    """The task without rows that choose: the draft has a share that few rows may not allow."""
    return section.model_copy(update={"select_share": None})


def _fast_dtype(platform: str) -> ComputeDtype:
    if platform != "cpu":
        return "bfloat16"
    return "bfloat16_products" if host.multiplies_bfloat16() else "float32"
