"""What a step draws, masks and dropout, anew each time; what share of the stage it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_stages import STUDENT, make_batch, mesh_of

from tinybert_jax.batches.batch import Batch
from tinybert_jax.models.heads import make_classifier, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.masked_lm import make_mlm
from tinybert_jax.objectives.objective import Objective, count_units, encoder_inputs
from tinybert_jax.training.step import init_state, make_train_step

KEY = jax.random.key(5)


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_the_mask_rate_moves_over_the_stage_and_every_step_draws_anew(unit):
    objective = make_mlm(
        make_masked_lm(STUDENT)[0],
        mask_rate=0.4,
        mask_rate_end=0.1,
        mask_token_id=4,
        special_token_ids=(0, 1, 2),
        vocab_size=52,
        unit=unit,
        is_continuation=np.arange(52) % 4 == 3,
    )
    ids = np.random.default_rng(0).integers(5, 50, (2048, 64)).astype(np.int32)
    batch = Batch(
        Text(ids, 0 * ids),
        np.ones(ids.shape, bool),
        {"labels": ids[:, 0]},
        np.ones(len(ids), np.float32),
    )
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def predictions(step, share):
        masked, counts = objective.prepare(batch, jax.random.fold_in(KEY, step), share)
        positions, tokens = masked.targets["positions"], masked.targets["tokens"]
        return positions, (tokens != -100).sum(-1), counts.predictions

    for share, rate in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1)):
        _, per_row, total = predictions(0, share)
        assert total == per_row.sum()
        error = 3 * per_row.std() / np.sqrt(len(ids))
        assert abs(per_row.mean() - 64 * rate) <= error
    chosen = [np.asarray(predictions(step, 1.0)[0]) for step in (0, 1)]
    assert (chosen[0] != chosen[1]).any(-1).mean() > 0.9  # few rows have no span in either


def test_an_objective_is_told_how_far_the_stage_is():
    def prepare(batch, key, share):
        return batch, count_units(batch)._replace(predictions=share)

    def loss(params, batch, counts, key, targets):
        return params["w"] ** 2, {"share": counts.predictions}

    params, mesh, optimizer = {"w": jnp.ones(())}, mesh_of(1), optax.sgd(0.1)
    state = init_state(params, optimizer, KEY, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    objective = Objective(prepare, loss)
    step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=5)
    shares = []
    for _ in range(6):
        state, metrics = step(state, make_batch(), ())
        shares.append(float(metrics["share"]))
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("num_seeds", [None, 2])
def test_every_step_draws_its_masks_and_its_dropout_anew(num_seeds):
    """As its objective sees the keys; the same seed draws the same again."""

    def prepare(batch, key, share):
        return batch, count_units(batch)._replace(predictions=jax.random.uniform(key))

    def loss(params, batch, counts, key, targets):
        draws = {"mask": counts.predictions, "dropout": jax.random.uniform(key)}
        return params["w"] ** 2, draws

    mesh, optimizer = mesh_of(1), optax.sgd(0.1)
    key = KEY if num_seeds is None else jax.random.split(KEY, num_seeds)
    params = {"w": jnp.ones(key.shape)}

    def draws():
        state = init_state(params, optimizer, key, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        objective = Objective(prepare, loss)
        step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=5)
        history = []
        for _ in range(5):
            state, metrics = step(state, make_batch(), ())
            history.append((float(metrics["mask"]), float(metrics["dropout"])))
        return history

    history = draws()
    assert len({draw for step in history for draw in step}) == 2 * len(history)
    assert draws() == history


def test_dropout_draws_differ_by_step_and_repeat_by_seed():
    apply, init = make_classifier(STUDENT, 3)
    params, batch = jax.jit(init)(jax.random.key(0)), make_batch()

    @jax.jit
    def draw(step):
        return apply(
            params, *encoder_inputs(batch), jax.random.fold_in(jax.random.key(9), step)
        ).logits

    assert jnp.array_equal(draw(0), draw(0))
    assert not jnp.array_equal(draw(0), draw(1))
