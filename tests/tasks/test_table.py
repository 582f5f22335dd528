"""Which task the head of a folder is for, and which heads are of none that we know."""

from pathlib import Path

import pytest

from tinybert_jax.config.tasks import TaggingTask
from tinybert_jax.huggingface.folder import HfModel
from tinybert_jax.huggingface.head import read_head
from tinybert_jax.huggingface.tensors import Tensors
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks.table import TASKS, task_of

FOLDER = Path("somewhere")


def _model(num_outputs: int, **config) -> HfModel:
    """As read from a folder whose config.json has these fields."""
    head = read_head(config, FOLDER, (num_outputs, 8))
    return HfModel(FOLDER, ModelConfig(), head.label_names, head, Tensors({}, {}))


TAGS = {"id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}}


@pytest.mark.parametrize(
    ("num_outputs", "config", "kind"),
    [
        (2, {}, "classification"),  # an old folder, without a class or a problem type
        (2, {"architectures": ["BertForSequenceClassification"]}, "classification"),
        (3, {"problem_type": "single_label_classification"}, "classification"),
        (1, {}, "regression"),
        (1, {"problem_type": "regression"}, "regression"),
        (3, {"problem_type": "multi_label_classification"}, "multi_label"),
        (1, {"problem_type": "multi_label_classification"}, "multi_label"),
        (3, {"architectures": ["BertForTokenClassification"], **TAGS}, "tagging"),
    ],
)
def test_a_head_is_for_one_task(num_outputs, config, kind):
    task = task_of(_model(num_outputs, **config))
    assert task is TASKS[kind] and task.kind == kind


@pytest.mark.parametrize(
    ("num_outputs", "problem_type"), [(3, "regression"), (2, "extractive_summary")]
)
def test_a_head_of_no_task_is_refused(num_outputs, problem_type):
    named = f"got SequenceClassification with problem_type '{problem_type}' and {num_outputs} out"
    with pytest.raises(ValueError, match=named):
        task_of(_model(num_outputs, problem_type=problem_type))
    with pytest.raises(ValueError, match="expected a model with a head for a task, found none"):
        task_of(_model(2)._replace(head=None))


def test_of_tasks_with_one_head_the_folder_names_its_own(monkeypatch):
    """The name counts only where the rest of config.json agrees: others may have changed that."""
    stars = TASKS["multi_label"]._replace(section=type("Stars", (TaggingTask,), {}))
    monkeypatch.setitem(TASKS, "stars", stars)
    several = {"problem_type": "multi_label_classification"}
    assert task_of(_model(3, tinybert_task="stars", **several)) is stars
    for named in ({}, {"tinybert_task": "multi_label"}, {"tinybert_task": "unknown"}):
        assert task_of(_model(3, **named, **several)) is TASKS["multi_label"]
    one = {"problem_type": "single_label_classification"}
    assert task_of(_model(3, tinybert_task="stars", **one)) is TASKS["classification"]
    with pytest.raises(ValueError, match="expected the name of a kind of task as tinybert_task"):
        _model(3, tinybert_task=["stars"], **several)


def test_every_kind_has_a_section_of_its_own():
    assert [task.kind for task in TASKS.values()] == list(TASKS)
    assert len({task.section for task in TASKS.values()}) == len(TASKS)
