"""`losses.attention` and `losses.relations` against float64 score maps in PyTorch."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from reference import (
    assert_float32_of_bfloat16,
    assert_microbatches_add_up,
    assert_padding_is_nothing,
    assert_same,
    normal,
    value_and_grads,
)

from tinybert_jax.losses.attention import attention_mse, builds_score_maps, regroup_heads, score_mse
from tinybert_jax.losses.relations import relation_kl
from tinybert_jax.models.attention import attention_scores

F = torch.nn.functional
NORMALISATIONS = ["paper_code", "valid_only"]
BATCH, SEQ, HEADS = 4, 11, 3
LENGTHS = np.array([11, 4, 1, 0])
MASK = np.arange(SEQ)[None] < LENGTHS[:, None]
PACKED = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2],
        [1, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0] * 11,
    ],
    np.int32,
)
MASKS = {"padded": MASK, "packed": PACKED}


# losses.attention: by Gram matrices and by score maps

BOTH_FORMS = pytest.mark.parametrize("maps", [False, True], ids=["gram", "maps"])


@BOTH_FORMS
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("student_head_dim, teacher_head_dim", [(4, 6), (6, 4), (5, 5)])
def test_attention_mse_matches_score_maps(normalisation, student_head_dim, teacher_head_dim, maps):
    assert_same(
        attention_loss(normalisation, maps),
        score_map_reference(normalisation),
        normal(10, BATCH, SEQ, HEADS, student_head_dim),
        normal(11, BATCH, SEQ, HEADS, student_head_dim),
        normal(12, BATCH, SEQ, HEADS, teacher_head_dim),
        normal(13, BATCH, SEQ, HEADS, teacher_head_dim),
    )


@BOTH_FORMS
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_attention_mse_near_the_teacher(normalisation, distance, maps):
    """With equal head dims nothing cancels, however close the student is."""
    teacher = [normal(seed, BATCH, SEQ, HEADS, 8) for seed in (14, 15)]
    student = [x + normal(20 + i, *x.shape, scale=distance) for i, x in enumerate(teacher)]

    assert_same(
        attention_loss(normalisation, maps), score_map_reference(normalisation), *student, *teacher
    )


@BOTH_FORMS
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_attention_mse_near_a_wider_teacher(normalisation, maps):
    """With unequal head dims ‖A‖²/‖A_S − A_T‖² is about 50 here; times fp32's 6e-8 it is 3e-6."""
    student = [normal(seed, BATCH, SEQ, HEADS, 6) for seed in (16, 17)]
    rotation = np.linalg.qr(normal(18, 8, 8))[0][:6]
    query, key = (x + normal(22 + i, *x.shape, scale=0.1) for i, x in enumerate(student))
    teacher = [query @ rotation * np.float32((8 / 6) ** 0.5), key @ rotation]

    assert_same(
        attention_loss(normalisation, maps), score_map_reference(normalisation), *student, *teacher
    )


@BOTH_FORMS
def test_attention_mse_of_equal_models_is_zero(maps):
    query, key = (normal(seed, BATCH, SEQ, HEADS, 8) for seed in (14, 15))

    for result in value_and_grads(attention_loss("valid_only", maps), query, key, query, key):
        assert not result.any()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2])
def test_score_mse_matches_score_maps(normalisation, distance):
    """Padded rows. The error is 6e-8·‖A‖/‖A_S − A_T‖, about 1e-5 at the last distance."""
    teacher = normal(24, BATCH, HEADS, SEQ, SEQ)
    student = teacher + normal(25, *teacher.shape, scale=distance)

    def loss(student):
        return score_mse(student, jnp.array(teacher), jnp.array(MASK), normalisation=normalisation)

    def reference(student):
        return map_mse(normalisation, student, torch.tensor(teacher, dtype=torch.float64))

    assert_same(loss, reference, student)


def test_score_mse_equals_attention_mse_for_packed_rows():
    heads = [jnp.array(normal(26 + i, BATCH, SEQ, HEADS, 4 + i // 2 * 2)) for i in range(4)]
    mask = jnp.array(PACKED)

    def by_scores(query, key, *teacher):
        maps = attention_scores(query, key), attention_scores(*teacher)
        return score_mse(*maps, mask, normalisation="valid_only")

    def by_heads(*heads):
        return attention_mse(*heads, mask, normalisation="valid_only")

    results = (value_and_grads(loss, *heads) for loss in (by_scores, by_heads))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    junk = [jnp.where((mask > 0)[:, :, None, None], x, 1e6) for x in heads]
    assert by_scores(*junk) == by_scores(*heads)


def test_score_mse_of_bfloat16_maps_is_computed_in_float32():
    maps = [jnp.array(normal(26 + i, BATCH, HEADS, SEQ, SEQ), jnp.bfloat16) for i in range(2)]
    loss = functools.partial(score_mse, mask=jnp.array(MASK), normalisation="valid_only")
    assert_float32_of_bfloat16(loss, maps)


@pytest.mark.parametrize("teacher_head_dim", [4, 6])
def test_attention_mse_builds_no_score_map(teacher_head_dim):
    seq = 37
    student = jnp.zeros((2, seq, HEADS, 4))
    teacher = jnp.zeros((2, seq, HEADS, teacher_head_dim))

    def loss(*args):
        return attention_mse(
            *args, jnp.ones((2, seq), bool), normalisation="valid_only", count=jnp.float32(1)
        )

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(student, student, teacher, teacher)

    assert not builds_score_maps(seq, 4, teacher_head_dim, packed=False)
    assert builds_score_maps(seq, 20, 17, packed=False) and builds_score_maps(
        seq, 4, 4, packed=True
    )
    assert f"{seq}," in str(jaxpr)
    assert f"{seq},{seq}" not in str(jaxpr)


@BOTH_FORMS
@pytest.mark.parametrize("teacher_head_dim", [4, 6])
def test_padding_does_not_change_attention_mse(teacher_head_dim, maps):
    heads = [normal(32 + i, BATCH, SEQ, HEADS, 4) for i in range(2)]
    heads += [normal(34 + i, BATCH, SEQ, HEADS, teacher_head_dim) for i in range(2)]
    assert_padding_is_nothing(attention_loss("valid_only", maps), MASK, heads)


@BOTH_FORMS
def test_padded_keys_do_not_change_attention_mse_under_paper_code(maps):
    heads = [normal(32 + i, BATCH, SEQ, HEADS, 4) for i in range(4)]
    changed = [
        x if i % 2 == 0 else np.where(MASK[:, :, None, None], x, 1e6) for i, x in enumerate(heads)
    ]
    loss = jax.jit(attention_loss("paper_code", maps))

    assert loss(*map(jnp.array, heads)) == loss(*map(jnp.array, changed))


@BOTH_FORMS
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_microbatches_of_pairs_add_up_to_the_batch(normalisation, maps):
    heads = [normal(44 + i, BATCH, SEQ, HEADS, 4 + i // 2) for i in range(4)]
    num_pairs = 4 * SEQ**2 if normalisation == "paper_code" else np.square(LENGTHS).sum()
    loss = functools.partial(attention_mse, normalisation=normalisation, build_maps=maps)
    assert_microbatches_add_up(loss, [*heads, MASK], num_pairs)


@pytest.mark.parametrize(
    "loss", [functools.partial(attention_mse, normalisation="valid_only"), relation_kl]
)
def test_a_batch_without_tokens_is_zero_and_bfloat16_is_computed_in_float32(loss):
    heads = [normal(54 + i, BATCH, SEQ, HEADS, 4) for i in range(4)]
    no_token = jnp.zeros((BATCH, SEQ), bool)
    for got in value_and_grads(lambda *args: loss(*args, no_token), *heads):
        assert not got.any()
    heads = [jnp.array(x, jnp.bfloat16) for x in heads]
    assert_float32_of_bfloat16(lambda *args: loss(*args, jnp.array(MASK)), heads)


def test_an_unknown_normalisation_is_refused():
    """`inspect.unwrap` skips the jaxtyping check, which runs only in the tests."""
    heads, mask = [jnp.ones((2, 3, 1, 4))] * 4, jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="expected 'paper_code' or 'valid_only', got 'mean'"):
        inspect.unwrap(attention_mse)(*heads, mask, normalisation="mean")


@functools.cache
def attention_loss(normalisation, maps):
    def loss(student_query, student_key, teacher_query, teacher_key):
        return attention_mse(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            jnp.array(MASK),
            normalisation=normalisation,
            build_maps=maps,
        )

    return loss


def score_map_reference(normalisation):
    def scores(query, key):
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5

    def reference(student_query, student_key, teacher_query, teacher_key):
        student, teacher = scores(student_query, student_key), scores(teacher_query, teacher_key)
        return map_mse(normalisation, student, teacher)

    return reference


def map_mse(normalisation, student, teacher):
    mask = torch.tensor(MASK)
    if normalisation == "paper_code":
        is_key = mask[:, None, None, :]
        return F.mse_loss(student * is_key, teacher * is_key)
    is_pair = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(student)
    return F.mse_loss(student[is_pair], teacher[is_pair])


# losses.relations: block by block


def _relation_loss(mask, teacher, block_size):
    def loss(left, right):
        arrays = map(jnp.array, (*teacher, mask))
        return relation_kl(left, right, *arrays, block_size=block_size)

    return loss


def _relation_reference(mask, teacher):
    """Softmax over the tokens of the same example, KL, mean over heads and real tokens."""
    segments = torch.tensor(mask.astype(np.int64))
    is_pair = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)

    def log_probs(left, right):
        left, right = left.transpose(1, 2), right.transpose(1, 2)
        scores = left @ right.transpose(2, 3) / left.shape[-1] ** 0.5
        return scores.masked_fill(~is_pair[:, None], -1e9).log_softmax(-1)

    target = log_probs(*(torch.tensor(x, dtype=torch.float64) for x in teacher))

    def reference(left, right):
        divergence = F.kl_div(log_probs(left, right), target, reduction="none", log_target=True)
        return divergence.sum(-1).mean(1)[segments > 0].mean()

    return reference


def _relation_teacher(head_dim=6):
    return [normal(seed, BATCH, SEQ, HEADS, head_dim, scale=1.5) for seed in (1, 2)]


@pytest.mark.parametrize("block_size", [1, 4, 11, 128])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_relation_kl_matches_score_maps(mask, block_size):
    student = [normal(seed, BATCH, SEQ, HEADS, 4, scale=1.5) for seed in (3, 4)]
    teacher = _relation_teacher()
    assert_same(
        _relation_loss(mask, teacher, block_size), _relation_reference(mask, teacher), *student
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_relation_kl_of_values_with_themselves_matches_score_maps(mask):
    values, teacher = normal(3, BATCH, SEQ, HEADS, 4), [_relation_teacher()[0]] * 2
    loss, reference = _relation_loss(mask, teacher, 4), _relation_reference(mask, teacher)
    assert_same(lambda x: loss(x, x), lambda x: reference(x, x), values)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3])
def test_relation_kl_near_the_teacher(distance, mask):
    """Nothing cancels, however close the student is."""
    teacher = _relation_teacher()
    student = [x + normal(20 + i, *x.shape, scale=distance) for i, x in enumerate(teacher)]
    assert_same(_relation_loss(mask, teacher, 4), _relation_reference(mask, teacher), *student)


def test_relation_kl_far_from_the_teacher():
    """Probabilities of 0 and 1. Scores in the hundreds have errors of hundreds times 6e-8."""
    teacher = [8 * x for x in _relation_teacher()]
    student = [normal(seed, BATCH, SEQ, HEADS, 6, scale=8) for seed in (3, 4)]
    loss, reference = _relation_loss(MASK, teacher, 4), _relation_reference(MASK, teacher)
    assert_same(loss, reference, *student, tolerance=2e-4)


def test_padding_does_not_change_relation_kl():
    student = [normal(seed, BATCH, SEQ, HEADS, 4) for seed in (3, 4)]
    for mask in MASKS.values():
        real = (mask > 0)[:, :, None, None]
        teacher = _relation_teacher()
        expected = value_and_grads(_relation_loss(mask, teacher, 4), *student)
        junk = [np.where(real, x, np.float32(np.nan)) for x in (*student, *teacher)]
        got = value_and_grads(_relation_loss(mask, junk[2:], 4), *junk[:2])
        for value, want in zip(got, expected, strict=True):
            np.testing.assert_array_equal(value, want)


def test_relation_kl_gives_the_teacher_no_gradient():
    teacher = [jnp.array(x) for x in _relation_teacher()]
    student = [jnp.array(normal(seed, BATCH, SEQ, HEADS, 4)) for seed in (3, 4)]
    grads = jax.grad(lambda teacher: relation_kl(*student, *teacher, jnp.array(MASK)))(teacher)
    assert not any(grad.any() for grad in grads)


def test_memory_of_relation_kl_grows_linearly_with_the_length():
    """At twice the length blocks need twice the temporary memory; whole maps need four times."""

    def temporary_bytes(loss, seq):
        shape = jax.ShapeDtypeStruct((1, seq, 2, 8), jnp.float32)
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = step.lower(*[shape] * 4).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def in_blocks(*heads):
        return relation_kl(*heads, jnp.ones(heads[0].shape[:2], bool), block_size=64)

    def in_one_map(*heads):
        return relation_kl(*heads, jnp.ones(heads[0].shape[:2], bool), block_size=heads[0].shape[1])

    assert temporary_bytes(in_blocks, 1024) <= 2.2 * temporary_bytes(in_blocks, 512)
    assert temporary_bytes(in_one_map, 1024) >= 3.5 * temporary_bytes(in_one_map, 512)


def test_regroup_keeps_the_features():
    x = jnp.array(normal(0, 2, 3, 4, 6))
    grouped = regroup_heads(x, 8)
    assert grouped.shape == (2, 3, 8, 3)
    np.testing.assert_array_equal(grouped.reshape(2, 3, 24), x.reshape(2, 3, 24))
    with pytest.raises(ValueError, match="expected a divisor of the width 24, got 7"):
        regroup_heads(x, 7)


def test_microbatches_of_tokens_add_up_to_the_batch():
    heads = [normal(44 + i, BATCH, SEQ, HEADS, 4) for i in range(4)]
    assert_microbatches_add_up(relation_kl, [*heads, MASK], LENGTHS.sum())


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(
    "dtype, precision",
    [(jnp.float32, jax.lax.Precision.HIGHEST), (jnp.bfloat16, jax.lax.Precision.HIGH)],
)
def test_products_of_attention_mse_have_the_precision_of_the_dtype(dtype, precision, maps):
    """In the value and the gradient, read from the jaxpr: on a CPU all precisions are equal."""
    heads = [jnp.ones((2, 8, 2, dim), dtype) for dim in (4, 4, 6, 6)]
    loss = functools.partial(
        attention_mse,
        mask=jnp.ones((2, 8), bool),
        normalisation="valid_only",
        build_maps=maps,
    )
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*heads))
    found = re.findall(r"precision=\(Precision.(\w+), Precision.(\w+)\)", text)
    assert found and {name for pair in found for name in pair} == {precision.name}
