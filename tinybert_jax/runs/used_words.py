"""Trains a stage with those rows of the word tables that its text uses.

Half of the parameters of a small BERT are rows of its word table, and a few thousand texts use a
tenth of them. The optimizer reads and writes every row in every step, whether text uses it or not:
on a CPU that is a large part of a step with short texts. Here teacher, students and optimizer hold
the used rows alone, and token ids are places among these; evaluation and the saved models have the
whole tables again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.stages import TaskStageSection
from tinybert_jax.runs.run import Run
from tinybert_jax.runs.stage import Member, Training, run_stage

_MULTIPLE = 128  # of the number of rows held, so that meshes can split them


def train_stage(run: Run, training: Training) -> dict[str, list[Any]]:
    """As `run_stage`; with `trained_words: used` rows that no text uses keep their start."""
    held, whole = with_used_words(run, training)
    trained = run_stage(run, held)
    return {
        name: [whole(params, name, seed) for seed, params in enumerate(models)]
        for name, models in trained.items()
    }


def with_used_words(
    run: Run, training: Training
) -> tuple[Training, Callable[[Any, str, int], Any]]:
    """The stage as it trains, and whole(params, member, seed): the model that it has trained."""
    section = training.section
    if not (isinstance(section, TaskStageSection) and section.trained_words == "used"):
        return training, lambda params, name, seed: params
    words = UsedWords(_used_ids(run, training), run.teacher.vocab_size)
    run.log.say(
        f"{training.name}: trains the {len(words.ids):,} rows of the word table that its text "
        f"uses, of {words.vocab_size:,}"
    )
    starts: dict[tuple[str, int], np.ndarray] = {}  # the whole table of each member and seed

    def member(name: str, own: Member) -> Member:
        def init_params(key: jax.Array, seed: int) -> Any:
            params = own.init_params(key, seed)
            starts[name, seed] = _table(params)
            return words.cut(params)

        evaluator = own.evaluator
        if evaluator is not None:
            measure = evaluator.measure
            evaluator = evaluator._replace(measure=lambda params: measure(words.padded(params)))
        return own._replace(
            random_params=lambda key: words.cut(own.random_params(key)),
            init_params=init_params,
            evaluator=evaluator,
        )

    batches, frozen = training.batches, training.frozen
    held = training._replace(
        members={name: member(name, own) for name, own in training.members.items()},
        batches=batches._replace(
            batch_at=lambda step: words.renumber(batches.batch_at(step)),
            part_at=lambda step: words.renumber(batches.part_at(step)),
        ),
        frozen=frozen._replace(read=lambda params: words.cut(frozen.read(params))),
    )
    return held, lambda params, name, seed: words.whole(params, starts[name, seed])


class UsedWords(NamedTuple):
    """The rows of word tables [vocab, dim] that a stage holds: those of `ids`, in that order.

    Some rows follow them that nothing reads, up to a multiple of 128.
    """

    ids: Int[np.ndarray, " used"]  # in rising order
    vocab_size: int

    def cut(self, params: Any) -> Any:
        """The parameters with tables of the held rows alone."""
        num_held = min(-(-len(self.ids) // _MULTIPLE) * _MULTIPLE, self.vocab_size)
        held = np.concatenate([self.ids, np.repeat(self.ids[:1], num_held - len(self.ids))])
        return _change_tables(params, lambda table: jnp.asarray(table)[held])

    def renumber(self, batch: Batch) -> Batch:
        """The batch with token ids that are places among the held rows."""
        places = np.zeros(self.vocab_size, np.int32)
        places[self.ids] = np.arange(len(self.ids))
        text = batch.inputs._replace(input_ids=places[batch.inputs.input_ids])
        return batch._replace(inputs=text)

    def padded(self, params: Any) -> Any:
        """The parameters with whole tables; other rows, which no text to evaluate uses, are 0."""

        def whole(table: jax.Array) -> jax.Array:
            zeros = jnp.zeros((self.vocab_size, table.shape[1]), table.dtype)
            return zeros.at[self.ids].set(table[: len(self.ids)])

        return _change_tables(params, whole)

    def whole(self, params: Any, start: Float[np.ndarray, "vocab dim"]) -> Any:
        """The parameters with whole tables, whose other rows are those of `start`."""

        def whole(table: Any) -> np.ndarray:
            rows = np.array(start)
            rows[self.ids] = np.asarray(table)[: len(self.ids)]
            return rows

        return _change_tables(params, whole)


def _used_ids(run: Run, training: Training) -> Int[np.ndarray, " used"]:
    """The ids of the stage's text, of the text that evaluates it, and of the special tokens."""
    task, section = run.required_task, training.section
    text = task.data.train if training.plan.stage.text == "labelled" else task.data.distilled
    parts = [text, task.data.selection] if training.evaluators else [text]
    rows = [task.kind.encode(run.tokenizer, part, section.max_length).ids for part in parts]
    return np.unique(np.concatenate([*rows, np.array(run.tokenizer.all_special_ids)]))


def _table(params: Any) -> Float[np.ndarray, "vocab dim"]:
    """The only word table of `params`."""
    found: list[np.ndarray] = []
    _change_tables(params, lambda table: found.append(np.asarray(table)))
    (table,) = found
    return table


def _change_tables(params: Any, change: Callable[[Any], Any]) -> Any:
    """`params` with `change(table)` for every word table [vocab, dim]."""

    def changed(path: tuple, leaf: Any) -> Any:
        keys = tuple(getattr(part, "key", None) for part in path[-3:])
        return change(leaf) if keys == ("embeddings", "word", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(changed, params)
