"""Where a run's metrics go besides `metrics.jsonl`. Imports no JAX."""

from typing import Literal

from pydantic import Field

from tinybert_jax.settings.section import Section

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class LogSection(Section):
    """Experiment trackers; `metrics.jsonl` holds every row whatever becomes of them."""

    trackers: tuple[TrackerName, ...] = Field(
        default=(),
        description="tensorboard: event files in run_dir/tensorboard; wandb, trackio: their "
        "packages' own settings (environment variables, logins) count. Each is an extra of this "
        "package. One that fails is left out; the run goes on",
    )
    project: str = Field(
        default="tinybert", description="project in wandb and trackio; the run has its `name`"
    )
