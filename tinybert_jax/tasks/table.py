"""All kinds of tasks, and the kind that the head of a Hugging Face folder is for."""

from tinybert_jax.huggingface.folder import HfModel
from tinybert_jax.huggingface.sentence_folder import read_sentence_folder
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.embeddings import EMBEDDINGS, make_embeddings
from tinybert_jax.tasks.multi_label import MULTI_LABEL
from tinybert_jax.tasks.question_answering import QUESTION_ANSWERING
from tinybert_jax.tasks.regression import REGRESSION
from tinybert_jax.tasks.tagging import TAGGING
from tinybert_jax.tasks.task import Task
from tinybert_jax.tasks.translation import TRANSLATION

TASKS: dict[str, Task] = {
    task.kind: task
    for task in (
        CLASSIFICATION,
        REGRESSION,
        MULTI_LABEL,
        TAGGING,
        QUESTION_ANSWERING,
        EMBEDDINGS,
        TRANSLATION,
    )
}


def task_of(model: HfModel) -> Task:
    """The task that the head of `model` is for; raises ValueError where it has no such head.

    A model without a head whose folder is one of sentence-transformers is for embeddings.

    Of the tasks that have this head and problem type in transformers it is the one that
    config.json names. A folder that names none of them is for the first.
    """
    if model.head is None:
        own = read_sentence_folder(model.folder)
        if own is not None:
            return make_embeddings(own.pooling, own.normalise, max_length=own.max_length)
        raise ValueError(
            f"{model.folder}: expected a model with a head for a task, found none; fine-tune it "
            "first (tinybert finetune)"
        )
    given = model.head.kind, _problem_type(model)
    fitting = {kind: t for kind, t in TASKS.items() if (t.hf_head, t.problem_type) == given}
    if fitting:
        return fitting.get(model.head.task or "", next(iter(fitting.values())))
    known = sorted({f"{t.hf_head}, {t.problem_type}" for t in TASKS.values()})
    raise ValueError(
        f"{model.folder}: expected a head of one of the kinds {known}, got {model.head.kind} with "
        f"problem_type {model.head.problem_type!r} and {len(model.head.label_names)} outputs; use "
        "another model"
    )


def _problem_type(model: HfModel) -> str | None:
    """The problem type of the head, with a name of its own for regression of several numbers."""
    assert model.head is not None
    if model.head.kind != CLASSIFICATION.hf_head:
        return None
    given = model.head.problem_type
    is_several = given == REGRESSION.problem_type and len(model.head.label_names) > 1
    return "several numbers" if is_several else given
