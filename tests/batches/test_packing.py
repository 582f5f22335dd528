"""Packed, bucketed and padded rows of the same examples give the same logits and gradients."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tinybert_jax.batches.batch import Batch, Plan, TokenRows, make_batch
from tinybert_jax.batches.packing import pack, packed_epochs, rows_per_batch
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.models.heads import make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives.distillation import Role, make_distill
from tinybert_jax.objectives.objective import encoder_inputs
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of

WIDTH = 24
CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=WIDTH,
)
STUDENT = CONFIG.model_copy(update={"hidden_size": 16, "num_hidden_layers": 1})


def _rows(num: int = 12, seed: int = 0) -> TokenRows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 12, num)
    ids = rng.integers(5, CONFIG.vocab_size, lengths.sum()).astype(np.int32)
    return TokenRows(
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=rng.integers(2, lengths + 1).astype(np.int32),
        labels=rng.integers(0, 3, num).astype(np.int32),
        num_truncated=0,
    )


ROWS = _rows()
BINS = pack(ROWS.lengths, WIDTH, seed=0)


def _batch(rows: np.ndarray, width: int) -> Batch:
    return jax.tree.map(jnp.asarray, make_batch(ROWS, Plan(rows, width), 0))


PACKED = _batch(BINS, WIDTH)
PADDED, BUCKET = _batch(np.arange(12), WIDTH), _batch(np.arange(12), 12)


def _params(init, seed):
    """Weights that are large enough for scores and logits to differ between examples."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), init(jax.random.key(0))
    )


@pytest.mark.parametrize("width", [16, 24, 64])
def test_every_example_is_packed_once_and_fits(width):
    lengths = np.random.default_rng(2).integers(3, 16, 500)
    bins = pack(lengths, width, seed=3)
    chosen = bins[bins >= 0]
    assert sorted(chosen.tolist()) == list(range(500))
    filled = np.where(bins >= 0, lengths[bins], 0).sum(1)
    assert filled.max() <= width
    assert len(bins) <= 11 / 9 * np.ceil(lengths.sum() / width) + 1, "the bound of best fit"
    assert np.array_equal(bins, pack(lengths, width, seed=3))
    assert not np.array_equal(bins, pack(lengths, width, seed=4))


@hypothesis.given(st.data(), st.integers(1, 60), st.integers(0, 2**31))
def test_any_lengths_are_packed_once_and_fit(data, width, seed):
    lengths = np.array(data.draw(st.lists(st.integers(1, width), max_size=80)), np.int64)
    bins = pack(lengths, width, seed=seed)
    assert sorted(bins[bins >= 0].tolist()) == list(range(len(lengths)))
    filled = [lengths[row[row >= 0]].sum() for row in bins]
    assert all(0 < tokens <= width for tokens in filled)
    # Best fit: the examples of two bins never fit into one.
    assert all(a + b > width for a, b in itertools.combinations(filled, 2))
    assert np.array_equal(bins, pack(lengths, width, seed=seed))


@hypothesis.given(
    st.lists(st.integers(1, 24), min_size=1, max_size=80),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_any_packed_epoch_holds_every_example_once(lengths, global_batch_size, multiple, seed):
    def plans(epoch):
        epochs = packed_epochs(
            np.array(lengths, np.int64),
            width=24,
            global_batch_size=global_batch_size,
            seed=(seed,),
            multiple=multiple,
        )
        assert len(epochs.plan(epoch)) == epochs.num_batches
        return [plan.rows for plan in epochs.plan(epoch)]

    rows = plans(3)
    chosen = np.concatenate([plan.ravel() for plan in rows])
    assert sorted(chosen[chosen >= 0].tolist()) == list(range(len(lengths)))
    assert {len(plan) % multiple for plan in rows} == {0}
    assert all(np.array_equal(a, b) for a, b in zip(rows, plans(3), strict=True))


@pytest.mark.parametrize("multiple", [1, 2])
def test_batches_of_packed_rows_do_not_depend_on_the_number_of_devices(multiple):
    lengths = np.random.default_rng(2).integers(3, 16, 500)

    def plans(num_shards):
        epochs = packed_epochs(
            lengths,
            width=32,
            global_batch_size=23,
            seed=(1,),
            multiple=multiple,
            num_shards=num_shards,
        )
        return epochs.plan(3)

    for one, eight in zip(plans(1), plans(8), strict=True):
        assert len(eight.rows) % (8 * multiple) == 0
        assert np.array_equal(eight.rows[: len(one.rows)], one.rows)
        assert (eight.rows[len(one.rows) :] == -1).all()


def test_packed_epochs_hold_every_example_once_in_batches_of_one_shape():
    lengths = np.random.default_rng(2).integers(3, 16, 500)
    epochs = packed_epochs(lengths, width=32, global_batch_size=24, seed=(1,), multiple=2)
    first, second = epochs.plan(0), epochs.plan(1)
    assert len(first) == len(second) == epochs.num_batches
    assert {plan.rows.shape for plan in first + second} == {first[0].rows.shape}
    assert first[0].rows.shape[0] % 2 == 0
    for plans in (first, second):
        chosen = np.concatenate([plan.rows.ravel() for plan in plans])
        assert sorted(chosen[chosen >= 0].tolist()) == list(range(500))
    sizes = [int((plan.rows >= 0).sum()) for plan in first[:-1]]
    assert 20 <= np.mean(sizes) <= 28
    assert not np.array_equal(first[0].rows, second[0].rows)


def test_a_packed_row_holds_its_examples_end_to_end():
    ids, types = PACKED.inputs
    assert len(ids) < len(PADDED.inputs.input_ids)
    for row, examples in enumerate(BINS):
        expected, expected_types = [], []
        for number, example in enumerate(examples[examples >= 0], 1):
            begin, end = ROWS.offsets[example], ROWS.offsets[example + 1]
            place = PACKED.attention_mask[row] == number
            assert ids[row][place].tolist() == ROWS.ids[begin:end].tolist()
            expected += ROWS.ids[begin:end].tolist()
            expected_types += (np.arange(end - begin) >= ROWS.second[example]).astype(int).tolist()
            assert PACKED.targets["labels"][row, number - 1] == ROWS.labels[example]
        assert ids[row, : len(expected)].tolist() == expected
        assert types[row, : len(expected)].tolist() == expected_types
    assert PACKED.weights.sum() == 12


def _by_example(packed: np.ndarray) -> np.ndarray:
    """Reorders [bins, segments, …] to [examples, …], in the order of `ROWS`."""
    values = np.zeros((12, *packed.shape[2:]), packed.dtype)
    for row, examples in enumerate(BINS):
        for segment, example in enumerate(examples[examples >= 0]):
            values[example] = packed[row, segment]
    return values


def test_logits_of_packed_padded_and_bucketed_rows_are_the_same():
    apply, init = make_classifier(CONFIG, 3)
    params = _params(init, 1)

    def logits(batch):
        inputs = encoder_inputs(batch)
        return np.asarray(apply(params, *inputs, num_segments=batch.num_segments).logits)

    padded, packed = logits(PADDED), _by_example(logits(PACKED))
    assert np.ptp(padded, axis=0).min() > 0.1, "else the comparison says nothing"
    np.testing.assert_allclose(packed, padded, atol=1e-5)
    np.testing.assert_allclose(logits(BUCKET), padded, atol=1e-5)


def test_packed_evaluation_gives_the_logits_of_padded_evaluation():
    apply, init = make_classifier(CONFIG, 3)
    rows, params = _rows(num=50, seed=5), _params(init, 1)
    options = {"buckets": (8, 12, WIDTH), "pad_token_id": 0}
    padded = make_scorer(apply, **options)(params, rows, global_batch_size=16)
    packed = make_scorer(apply, **options, packed=True)(params, rows, global_batch_size=16)
    assert np.ptp(padded, axis=0).min() > 0.1, "else the comparison says nothing"
    np.testing.assert_allclose(packed, padded, atol=1e-5)


def _objective(kind):
    if kind == "classification":
        apply, init = make_classifier(STUDENT, 3)
        return make_supervised(apply), _params(init, 1), ()
    terms = DistillSection.model_validate({"prediction": KINDS[kind]}).terms("prediction")
    reads, teacher_reads = reads_of(terms), reads_of(terms, of_teacher=True)
    student = STUDENT.model_copy(update={"hidden_size": 32}) if kind in EQUAL else STUDENT
    (apply, init), (teacher_apply, teacher_init) = (
        make_classifier(sizes, 3) if own.task_logits else make_encoder(sizes)
        for own, sizes in ((reads, student), (teacher_reads, CONFIG))
    )
    objective = make_distill(
        Role(apply, reads, student.num_hidden_layers),
        Role(teacher_apply, teacher_reads, CONFIG.num_hidden_layers),
        terms,
    )
    kernel = jax.random.normal(jax.random.key(4), (1, 16, 32))
    projection = {"kernel": kernel, "bias": jnp.ones((1, 32))}
    return (
        objective,
        {"student": _params(init, 1), "projection": projection},
        _params(teacher_init, 2),
    )


KINDS = {
    "classification": None,
    "prediction": [
        {"term": "logits", "temperature": 2.0, "form": "kl", "weight": 0.7},
        {"term": "label", "weight": 0.3},
        {"term": "logits"},
    ],
    "layers": [{"term": "attention"}, {"term": "hidden"}, {"term": "embedding"}],
    "relations": [{"term": "relation", "heads": 4}, {"term": "attention", "heads": 8}],
    "patience": [{"term": "label"}, {"term": "cls", "layer_map": "last"}, {"term": "cosine"}],
    "pooled": [{"term": "pooled"}],
    "pooled and logits": [{"term": "pooled"}, {"term": "logits"}],
}
EQUAL = ("patience", "pooled", "pooled and logits")  # kinds of terms that want equal widths


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_same(kind):
    objective, params, frozen = _objective(kind)

    def run(batch):
        batch, counts = objective.prepare(batch, jax.random.key(0), jnp.float32(0))
        differentiate = jax.value_and_grad(objective.loss, has_aux=True)
        return differentiate(params, batch, counts, None, objective.targets(batch, frozen))

    (value, parts), grads = run(PADDED)
    for other in (BUCKET, PACKED):
        (same, same_parts), same_grads = run(other)
        np.testing.assert_allclose(same, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), same_parts, parts)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
        jax.tree.map(
            lambda a, b, s=largest: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * s),
            same_grads,
            grads,
        )


def test_masked_lm_loss_of_given_labels_is_the_same():
    apply, init = make_masked_lm(CONFIG)
    params = _params(init, 1)

    def nll(batch):
        log_probs = jax.nn.log_softmax(apply(params, *encoder_inputs(batch)).logits)
        picked = jnp.take_along_axis(log_probs, batch.inputs.input_ids[:, :, None], axis=2)[..., 0]
        return np.sort(np.asarray(picked)[np.asarray(batch.real)])

    np.testing.assert_allclose(nll(PACKED), nll(PADDED), atol=1e-5)


def test_a_segment_does_not_depend_on_other_segments():
    apply, init = make_classifier(CONFIG, 3)
    params = _params(init, 1)
    forward = jax.jit(
        lambda ids: apply(
            params,
            Text(ids, PACKED.inputs.token_type_ids),
            PACKED.attention_mask,
            num_segments=PACKED.num_segments,
            taps=True,
        )
    )
    row = int(np.argmax((BINS >= 0).sum(1)))
    segments = PACKED.attention_mask[row]
    changed = np.array(PACKED.inputs.input_ids)
    changed[row, segments == 1] = (changed[row, segments == 1] + 7) % 45 + 5
    before, after = forward(PACKED.inputs.input_ids), forward(changed)
    others = (segments > 1)[None, :]
    assert not np.array_equal(before.logits[row, 0], after.logits[row, 0])
    assert np.array_equal(before.logits[row, 1:], after.logits[row, 1:])
    hidden = np.asarray(before.encoder.hidden)[:, row], np.asarray(after.encoder.hidden)[:, row]
    kept = np.broadcast_to(others, hidden[0].shape[:2])
    assert np.array_equal(hidden[0][kept], hidden[1][kept])


def test_an_example_goes_into_a_bin_that_it_fills_exactly():
    assert len(pack(np.array([6, 6, 4, 4]), 10, seed=0)) == 2
    assert len(pack(np.array([7, 6, 4, 3]), 10, seed=0)) == 2


def test_a_batch_has_the_nearest_number_of_rows_for_its_examples():
    assert rows_per_batch(7, 10, 4, multiple=1) == 3  # of 2.8
    assert rows_per_batch(6, 10, 4, multiple=1) == 2  # of 2.4
    assert rows_per_batch(7, 10, 16, multiple=4) == 12  # of 11.2
    assert rows_per_batch(7, 1000, 4, multiple=4) == 4
