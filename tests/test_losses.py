"""Every loss against a float64 PyTorch reference written from the definition, value and gradients.

Tolerance 1e-5 (relative, in norm): fp32 has 6e-8 and the sums here are short, so that leaves room
for the softmaxes and nothing else.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax import attention_losses, losses

torch = pytest.importorskip("torch")
from reference import assert_same, normal, relative_error, value_and_grads  # noqa: E402

F = torch.nn.functional

NORMALISATIONS = ["paper_code", "valid_only"]
LENGTHS = np.array([7, 3, 1, 5, 0])
BATCH, SEQ, HEADS = 5, 7, 3
MASK = np.arange(SEQ)[None, :] < LENGTHS[:, None]
WEIGHTS = np.array([1, 0.5, 0, 2, 1], np.float32)
LABELS = np.array([2, 0, -100, 1, 3])


def test_softmax_cross_entropy_matches_torch():
    for label_smoothing in (0.0, 0.1):

        def loss(logits, label_smoothing=label_smoothing):
            return losses.softmax_cross_entropy(
                logits, jnp.array(LABELS), jnp.array(WEIGHTS), label_smoothing=label_smoothing
            )

        def reference(logits, label_smoothing=label_smoothing):
            per_example = F.cross_entropy(
                logits, torch.tensor(LABELS), reduction="none", label_smoothing=label_smoothing
            )
            return weighted_mean(per_example)

        assert_same(loss, reference, normal(0, BATCH, 4, scale=5))


def test_masked_lm_matches_torch():
    labels = np.array([3, -100, 0, 10, -100, 7])

    assert_same(
        lambda logits: losses.masked_lm(logits, jnp.array(labels)),
        lambda logits: F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100),
        normal(1, 6, 11, scale=5),
    )


VOCAB_LABELS = np.array([3, -100, 0, 10, -100, -100, -100, 7, 3, 0, 10, 9])


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_chunks_of_logits_give_the_loss_and_the_gradients_of_the_whole(chunk_size, num_shards):
    """1e-6: what the order of fp32 sums over a dozen rows can make, and nothing else."""
    inputs = normal(2, 12, 6, scale=2), normal(3, 11, 6), normal(4, 11)
    labels = jnp.array(VOCAB_LABELS)

    def whole(hidden, table, bias):
        return losses.masked_lm(hidden @ table.T + bias[None], labels)

    def chunked(hidden, table, bias):
        return losses.masked_lm_from_hidden(
            hidden, table, bias, labels, chunk_size=chunk_size, num_shards=num_shards
        )

    for got, want in zip(
        value_and_grads(chunked, *inputs), value_and_grads(whole, *inputs), strict=True
    ):
        assert relative_error(got, want) <= 1e-6
    alone, want = (loss(*map(jnp.array, inputs)) for loss in (chunked, whole))
    np.testing.assert_allclose(alone, want, rtol=1e-6)  # without gradients
    assert_same(
        chunked,
        lambda hidden, table, bias: F.cross_entropy(
            hidden @ table.T + bias, torch.tensor(VOCAB_LABELS), ignore_index=-100
        ),
        *inputs,
    )


def test_sums_over_chunks_count_losses_and_hits():
    logits, real = normal(2, 12, 11, scale=2), VOCAB_LABELS >= 0
    logits[0, VOCAB_LABELS[0]] = logits[9, VOCAB_LABELS[9]] = 20  # two hits at least
    hidden, table, bias = logits, np.eye(11, dtype=np.float32), np.zeros(11, np.float32)

    got = jax.jit(functools.partial(losses.masked_lm_sums, chunk_size=5))(
        *map(jnp.array, (hidden, table, bias, VOCAB_LABELS))
    )

    nll = F.cross_entropy(
        torch.tensor(logits).double(),
        torch.tensor(VOCAB_LABELS),
        ignore_index=-100,
        reduction="sum",
    )
    np.testing.assert_allclose(got[0], nll, rtol=1e-6)
    num_hits = (logits.argmax(-1) == VOCAB_LABELS)[real].sum()
    assert got[1] == num_hits and 2 <= num_hits < real.sum()


def test_chunks_never_hold_the_logits_of_all_predictions():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 8), (4096, 8), (4096,))]
    labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
    whole_logits = 4 * 1024 * 4096

    def temporaries(loss):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return step.lower(*shapes, labels).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda h, t, b, y: losses.masked_lm(h @ t.T + b[None], y)) >= whole_logits
    chunked = functools.partial(losses.masked_lm_from_hidden, chunk_size=64)
    assert temporaries(chunked) <= whole_logits / 4


@pytest.mark.parametrize("reduction", ["sum", "mean_classes"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_cross_entropy_matches_torch(reduction, temperature):
    def loss(student, teacher):
        return losses.soft_cross_entropy(
            student, teacher, jnp.array(WEIGHTS), temperature=temperature, reduction=reduction
        )

    def reference(student, teacher):
        probs = torch.softmax(teacher / temperature, -1)
        per_class = -probs * torch.log_softmax(student / temperature, -1)
        return weighted_mean(per_class.sum(-1) if reduction == "sum" else per_class.mean(-1))

    assert_same(loss, reference, normal(2, BATCH, 4, scale=5), normal(3, BATCH, 4, scale=5))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_matches_torch(temperature):
    def loss(student, teacher):
        return losses.kl(student, teacher, jnp.array(WEIGHTS), temperature=temperature)

    def reference(student, teacher):
        per_class = F.kl_div(
            torch.log_softmax(student / temperature, -1),
            torch.softmax(teacher / temperature, -1),
            reduction="none",
        )
        return weighted_mean(per_class.sum(-1))

    assert_same(loss, reference, normal(4, BATCH, 4, scale=5), normal(5, BATCH, 4, scale=5))


def test_logits_mse_matches_torch():
    def reference(student, target):
        return weighted_mean(F.mse_loss(student, target, reduction="none").mean(-1))

    assert_same(
        lambda student, target: losses.logits_mse(student, target, jnp.array(WEIGHTS)),
        reference,
        normal(6, BATCH, 3),
        normal(7, BATCH, 3),
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_hidden_mse_matches_torch(normalisation):
    def reference(student, teacher):
        if normalisation == "paper_code":
            return F.mse_loss(student, teacher)
        return F.mse_loss(student[torch.tensor(MASK)], teacher[torch.tensor(MASK)])

    assert_same(
        lambda student, teacher: losses.hidden_mse(
            student, teacher, jnp.array(MASK), normalisation=normalisation
        ),
        reference,
        normal(8, BATCH, SEQ, 6),
        normal(9, BATCH, SEQ, 6),
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("student_head_dim, teacher_head_dim", [(4, 6), (6, 4), (5, 5)])
def test_attention_mse_matches_score_maps(normalisation, student_head_dim, teacher_head_dim):
    assert_same(
        attention_loss(normalisation),
        score_map_reference(normalisation),
        normal(10, BATCH, SEQ, HEADS, student_head_dim),
        normal(11, BATCH, SEQ, HEADS, student_head_dim),
        normal(12, BATCH, SEQ, HEADS, teacher_head_dim),
        normal(13, BATCH, SEQ, HEADS, teacher_head_dim),
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_attention_mse_near_the_teacher(normalisation, distance):
    """Equal head dims: no cancellation, however close the student is."""
    teacher = [normal(seed, BATCH, SEQ, HEADS, 8) for seed in (14, 15)]
    student = [x + normal(20 + i, *x.shape, scale=distance) for i, x in enumerate(teacher)]

    assert_same(
        attention_loss(normalisation), score_map_reference(normalisation), *student, *teacher
    )


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_attention_mse_near_a_wider_teacher(normalisation):
    """Unequal head dims: ‖A‖²/‖A_S − A_T‖² is about 50 here, times fp32's 6e-8 makes 3e-6."""
    student = [normal(seed, BATCH, SEQ, HEADS, 6) for seed in (16, 17)]
    rotation = np.linalg.qr(normal(18, 8, 8))[0][:6]
    query, key = (x + normal(22 + i, *x.shape, scale=0.1) for i, x in enumerate(student))
    teacher = [query @ rotation * np.float32((8 / 6) ** 0.5), key @ rotation]

    assert_same(
        attention_loss(normalisation), score_map_reference(normalisation), *student, *teacher
    )


def test_attention_mse_of_the_teacher_itself_is_zero():
    query, key = (normal(seed, BATCH, SEQ, HEADS, 8) for seed in (14, 15))

    for result in value_and_grads(attention_loss("valid_only"), query, key, query, key):
        assert not result.any()


@pytest.mark.parametrize("teacher_head_dim", [4, 6])
def test_attention_mse_builds_no_score_map(teacher_head_dim):
    seq = 37
    student = jnp.zeros((2, seq, HEADS, 4))
    teacher = jnp.zeros((2, seq, HEADS, teacher_head_dim))

    def loss(*args):
        return attention_losses.attention_mse(
            *args, jnp.ones((2, seq), bool), normalisation="valid_only", count=jnp.float32(1)
        )

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(student, student, teacher, teacher)

    assert f"{seq}," in str(jaxpr)
    assert f"{seq},{seq}" not in str(jaxpr)


@pytest.mark.parametrize("teacher_head_dim", [4, 6])
def test_padding_changes_nothing_under_valid_only(teacher_head_dim):
    hidden = [normal(seed, BATCH, SEQ, 6) for seed in (30, 31)]
    heads = [normal(32 + i, BATCH, SEQ, HEADS, 4) for i in range(2)]
    heads += [normal(34 + i, BATCH, SEQ, HEADS, teacher_head_dim) for i in range(2)]

    def hidden_loss(*args):
        return losses.hidden_mse(*args, jnp.array(MASK), normalisation="valid_only")

    for loss, inputs in ((hidden_loss, hidden), (attention_loss("valid_only"), heads)):
        expected = value_and_grads(loss, *inputs)
        for junk in (1e6, np.nan):
            padded = [np.where(expand(MASK, x), x, np.float32(junk)) for x in inputs]
            for got, want in zip(value_and_grads(loss, *padded), expected, strict=True):
                np.testing.assert_array_equal(got, want)


def test_padded_keys_change_nothing_under_paper_code():
    heads = [normal(32 + i, BATCH, SEQ, HEADS, 4) for i in range(4)]
    changed = [x if i % 2 == 0 else np.where(expand(MASK, x), x, 1e6) for i, x in enumerate(heads)]
    loss = jax.jit(attention_loss("paper_code"))

    assert loss(*map(jnp.array, heads)) == loss(*map(jnp.array, changed))


def test_microbatches_of_examples_add_up_to_the_batch():
    """With `count` of the whole batch, as gradient accumulation uses the losses."""
    student, teacher = (normal(40 + i, BATCH, 4) for i in range(2))
    soft = functools.partial(losses.soft_cross_entropy, reduction="sum")

    assert_adds_up(losses.softmax_cross_entropy, [student, LABELS, WEIGHTS], WEIGHTS[:4].sum())
    assert_adds_up(losses.masked_lm, [student, LABELS], 3)
    assert_adds_up(chunked_lm, [student, LABELS], 3)
    assert_adds_up(soft, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())
    assert_adds_up(losses.kl, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())
    assert_adds_up(losses.logits_mse, [student, teacher, WEIGHTS], WEIGHTS[:4].sum())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_microbatches_of_tokens_add_up_to_the_batch(normalisation):
    hidden = [normal(42 + i, BATCH, SEQ, 6) for i in range(2)]
    heads = [normal(44 + i, BATCH, SEQ, HEADS, 4 + i // 2) for i in range(4)]
    num_tokens, num_pairs = LENGTHS[:4].sum(), np.square(LENGTHS[:4]).sum()
    if normalisation == "paper_code":
        num_tokens, num_pairs = 4 * SEQ, 4 * SEQ**2
    hidden_mse = functools.partial(losses.hidden_mse, normalisation=normalisation)
    attention_mse = functools.partial(attention_losses.attention_mse, normalisation=normalisation)

    assert_adds_up(hidden_mse, [*hidden, MASK], num_tokens)
    assert_adds_up(attention_mse, [*heads, MASK], num_pairs)


def test_a_batch_without_valid_units_has_loss_and_gradient_zero():
    x, heads = jnp.ones((2, 3)), jnp.ones((2, 3, 1, 4))
    hidden, nothing, weights = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), bool), jnp.zeros(2)
    ignored = jnp.full(2, -100)
    cases = [
        lambda x: losses.softmax_cross_entropy(x, ignored, weights),
        lambda x: losses.masked_lm(x, ignored),
        lambda x: chunked_lm(x, ignored),
        lambda x: losses.kl(x, x + 1, weights),
        lambda x: losses.logits_mse(x, x + 1, weights),
        lambda x: losses.soft_cross_entropy(x, x + 1, weights, reduction="sum"),
        lambda x: losses.hidden_mse(x * hidden, hidden, nothing, normalisation="valid_only"),
        lambda x: attention_losses.attention_mse(
            x * heads, heads, heads, heads, nothing, normalisation="valid_only"
        ),
    ]
    inputs = [x, x, x, x, x, x, x[:, :, None], x[:, :, None, None]]
    for loss, value in zip(cases, inputs, strict=True):
        for got in jax.jit(jax.value_and_grad(loss))(value):
            assert not got.any()


def test_bfloat16_inputs_are_computed_in_float32():
    classes = [jnp.array(normal(50 + i, BATCH, 4), jnp.bfloat16) for i in range(2)]
    hidden = [jnp.array(normal(52 + i, BATCH, SEQ, 6), jnp.bfloat16) for i in range(2)]
    heads = [jnp.array(normal(54 + i, BATCH, SEQ, HEADS, 4), jnp.bfloat16) for i in range(4)]
    weights, mask = jnp.array(WEIGHTS), jnp.array(MASK)
    cases = [
        (lambda x: losses.softmax_cross_entropy(x, jnp.array(LABELS), weights), classes[:1]),
        (lambda x: losses.masked_lm(x, jnp.array(LABELS)), classes[:1]),
        (lambda x: chunked_lm(x, jnp.array(LABELS)), classes[:1]),
        (lambda x, y: losses.soft_cross_entropy(x, y, weights, reduction="sum"), classes),
        (lambda x, y: losses.kl(x, y, weights), classes),
        (lambda x, y: losses.logits_mse(x, y, weights), classes),
        (lambda x, y: losses.hidden_mse(x, y, mask, normalisation="valid_only"), hidden),
        (attention_loss("valid_only"), heads),
    ]
    for loss, inputs in cases:
        loss = jax.jit(loss)
        value = loss(*inputs)
        assert value.dtype == jnp.float32
        assert value == loss(*(x.astype(jnp.float32) for x in inputs))


def test_an_unknown_choice_is_refused():
    """Below the type check of the import hook, which is off outside the tests."""
    x, heads, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3), bool)
    for loss, args in ((losses.hidden_mse, [x] * 2), (attention_losses.attention_mse, [heads] * 4)):
        with pytest.raises(ValueError, match="expected 'paper_code' or 'valid_only', got 'mean'"):
            inspect.unwrap(loss)(*args, mask, normalisation="mean")
    with pytest.raises(ValueError, match="expected 'sum' or 'mean_classes', got 'mean'"):
        inspect.unwrap(losses.soft_cross_entropy)(x[0], x[0], jnp.ones(3), reduction="mean")


def assert_adds_up(loss, arrays, count):
    """The first four examples against two microbatches of two, unequal in valid units."""
    whole = jax.jit(jax.value_and_grad(loss))
    part = jax.jit(jax.value_and_grad(functools.partial(loss, count=jnp.float32(count))))

    value, grad = whole(*(jnp.array(x[:4]) for x in arrays))
    values, grads = zip(
        *(part(*(jnp.array(x[rows]) for x in arrays)) for rows in (slice(0, 2), slice(2, 4))),
        strict=True,
    )

    np.testing.assert_allclose(sum(values), value, rtol=1e-6)
    assert relative_error(np.concatenate(grads), np.asarray(grad)) <= 1e-6


def chunked_lm(hidden, labels, count=None):
    """Logits that are the hidden states and another two columns."""
    table, bias = (
        jnp.concatenate([jnp.eye(hidden.shape[1]), jnp.ones((2, 4))[:, : hidden.shape[1]]]),
        jnp.arange(hidden.shape[1] + 2.0),
    )
    return losses.masked_lm_from_hidden(hidden, table, bias, labels, chunk_size=1, count=count)


@functools.cache
def attention_loss(normalisation):
    def loss(student_query, student_key, teacher_query, teacher_key):
        return attention_losses.attention_mse(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            jnp.array(MASK),
            normalisation=normalisation,
        )

    return loss


def score_map_reference(normalisation):
    mask = torch.tensor(MASK)

    def scores(query, key):
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5

    def reference(student_query, student_key, teacher_query, teacher_key):
        student, teacher = scores(student_query, student_key), scores(teacher_query, teacher_key)
        if normalisation == "paper_code":
            is_key = mask[:, None, None, :]
            return F.mse_loss(student * is_key, teacher * is_key)
        is_pair = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(student)
        return F.mse_loss(student[is_pair], teacher[is_pair])

    return reference


def weighted_mean(per_example):
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    return (per_example * weights).sum() / weights.sum()


def expand(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))
