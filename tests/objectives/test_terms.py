"""Every preset against its paper's formula, written in PyTorch on what the two models give out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.losses import attention as attention_losses
from tinybert_jax.models.heads import Model, make_classifier, make_encoder, make_masked_lm
from tinybert_jax.models.inputs import Text
from tinybert_jax.objectives import masking
from tinybert_jax.objectives.alignment import init_projection
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.masked_lm import make_mask
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.terms.table import reads_of
from tinybert_jax.terms.term import Reads

F = torch.nn.functional
WIDTH, ROWS = 10, 6
TEACHER = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=WIDTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)
STUDENT = TEACHER.model_copy(update={"num_hidden_layers": 2})
STUDENT_OF_FOUR = TEACHER.model_copy(update={"intermediate_size": 16})
NARROW = STUDENT.model_copy(update={"hidden_size": 12})
LENGTHS = np.array([10, 3, 7, 5, 10, 4])
MASK = np.arange(WIDTH)[None] < LENGTHS[:, None]


def _batch():
    rng = np.random.default_rng(0)
    ids = np.where(MASK, rng.integers(5, 40, MASK.shape), 0).astype(np.int32)
    labels = rng.integers(0, 3, ROWS).astype(np.int32)
    weights = np.ones(ROWS, np.float32)
    return jax.tree.map(
        jnp.asarray, Batch(Text(ids, np.zeros_like(ids)), MASK, {"labels": labels}, weights)
    )


def _long(x):
    return torch.tensor(np.asarray(x)).long()


def _make_model(reads: Reads, sizes: ModelConfig, **options) -> Model:
    """The model that has the outputs which terms read."""
    if reads.words:
        return make_masked_lm(sizes, **options)
    return (
        make_classifier(sizes, 3, **options)
        if reads.task_logits
        else make_encoder(sizes, **options)
    )


def _whole(role):
    has_head = role.reads.words or role.reads.task_logits
    return functools.partial(role.apply, taps=True) if has_head else role.apply


class Case:
    """Both models' outputs as float64 tensors, and the objective's value and parts."""

    def __init__(self, section, stage, share=0.0, student=STUDENT, unroll=False, batch=None):
        terms, batch = section.terms(stage), batch or _batch()
        roles, params = [], []
        reads = reads_of(terms), reads_of(terms, of_teacher=True)
        for number, (sizes, own) in enumerate(zip((student, TEACHER), reads, strict=True)):
            apply, init = _make_model(own, sizes, unroll=unroll)
            roles.append(Role(apply, own, sizes.num_hidden_layers))
            params.append(jax.jit(init)(jax.random.key(number)))
        mask = None
        if section.general_mask_rate and stage == "general":
            ids = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 40}
            mask = make_mask(mask_rate=0.4, **ids)
        objective = make_distill(*roles, terms, mask=mask)
        width = student.hidden_size
        projection = init_projection(jax.random.key(3), width, 24, 1)
        ours = {"student": params[0], "projection": projection}
        self.projection = torch.tensor(np.asarray(projection["kernel"][0]), dtype=torch.float64)
        prepared, counts = objective.prepare(batch, jax.random.key(5), jnp.float32(share))
        goal = jax.jit(objective.targets)(prepared, params[1])
        loss = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
        (self.value, self.parts), self.grads = loss(ours, prepared, counts, None, goal)
        self.targets = prepared.targets
        self.student, self.teacher = (
            jax.tree.map(
                lambda x: torch.tensor(np.asarray(x), dtype=torch.float64),
                jax.jit(_whole(role))(own, prepared.inputs, prepared.attention_mask),
            )
            for role, own in zip(roles, params, strict=True)
        )

    def assert_parts(self, **parts):
        """(weight, expected value) of each part; their sum; finite gradients."""
        assert {f"loss/{name}" for name in parts} == self.parts.keys()
        for name, (_, expected) in parts.items():
            np.testing.assert_allclose(self.parts[f"loss/{name}"], expected, rtol=2e-5)
        total = sum(weight * expected for weight, expected in parts.values())
        np.testing.assert_allclose(self.value, total, rtol=2e-5)
        leaves = jax.tree.leaves(self.grads["student"])
        assert all(np.isfinite(leaf).all() for leaf in leaves)


REAL = torch.tensor(MASK)
PAIR = (REAL[:, :, None] & REAL[:, None, :])[:, None]


def _scores(left, right):
    left, right = left.transpose(1, 2), right.transpose(1, 2)
    return left @ right.transpose(2, 3) / left.shape[-1] ** 0.5


@pytest.fixture
def maps_read(monkeypatch):
    """Shapes of the maps that `score_mse` was given."""
    read, loss = [], attention_losses.score_mse
    recorded = lambda ours, theirs, *args, **kw: (  # noqa: E731
        read.append((ours.shape, theirs.shape)) or loss(ours, theirs, *args, **kw)
    )
    monkeypatch.setattr(attention_losses, "score_mse", recorded)
    return read


@pytest.mark.parametrize("unroll", [False, True])
def test_tinybert_general(unroll, maps_read):
    """Unrolled, the attention loss reads the maps that both models have built: heads of 3 and 6."""
    case = Case(DistillSection(), "general", student=NARROW, unroll=unroll)
    shape = (ROWS, 4, WIDTH, WIDTH)
    assert maps_read == 2 * [(shape, shape)] * unroll
    ours, theirs = case.student, case.teacher
    attention = hidden = 0.0
    for i, g in ((1, 2), (2, 4)):
        gap = _scores(ours.queries[i - 1], ours.keys[i - 1])
        gap = gap - _scores(theirs.queries[g - 1], theirs.keys[g - 1])
        attention += gap.square()[PAIR.expand_as(gap)].mean()
        hidden += F.mse_loss((ours.hidden[i] @ case.projection)[REAL], theirs.hidden[g][REAL])
    embedding = F.mse_loss((ours.hidden[0] @ case.projection)[REAL], theirs.hidden[0][REAL])
    case.assert_parts(attention=(1, attention), hidden=(1, hidden), embedding=(1, embedding))


def test_packed_rows_give_the_same_unrolled(maps_read):
    segments = np.where(MASK, 1 + (np.arange(WIDTH) >= 4), 0).astype(np.int32)
    batch = _batch()._replace(attention_mask=jnp.asarray(segments))
    scanned, unrolled = (
        Case(DistillSection(), "general", student=NARROW, unroll=unroll, batch=batch)
        for unroll in (False, True)
    )
    assert len(maps_read) == 2
    for name, value in scanned.parts.items():
        np.testing.assert_allclose(unrolled.parts[name], value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        unrolled.grads,
        scanned.grads,
    )


def test_tinybert_prediction():
    case = Case(DistillSection(), "prediction")
    goal = torch.softmax(case.teacher.logits, -1)
    soft = -(goal * torch.log_softmax(case.student.logits, -1)).sum(-1).mean()
    case.assert_parts(soft=(1, soft))


def test_minilmv2():
    terms = [{"term": "relation", "heads": 6}]
    section = DistillSection.model_validate({"preset": "minilmv2", "general": terms})
    case = Case(section, "general", student=NARROW)
    total = 0.0
    for name in ("queries", "keys", "values"):
        ours, theirs = (
            getattr(model, name)[-1].reshape(ROWS, WIDTH, 6, -1)
            for model in (case.student, case.teacher)
        )
        log_probs = [_scores(x, x).masked_fill(~PAIR, -1e9).log_softmax(-1) for x in (ours, theirs)]
        each = F.kl_div(*log_probs, reduction="none", log_target=True).sum(-1)
        total += each.mean(1)[REAL].mean()
    case.assert_parts(relation=(1, total))
    preset = DistillSection(preset="minilmv2")
    assert [(t.heads, t.layer_map, len(t.of)) for t in preset.terms("general")] == [(48, "last", 3)]
    gold = Case(preset, "prediction")
    label = F.cross_entropy(gold.student.logits, _long(gold.targets["labels"]))
    gold.assert_parts(label=(1, label))


@pytest.mark.parametrize("at", ["real", "masked"])
def test_distilbert(at):
    """Its code's KL is over every real token; at the masked ones it is an option."""
    section = DistillSection(preset="distilbert")
    assert section.terms("general")[0].at == "real"
    terms = [term.model_dump() for term in section.terms("general")]
    terms[0]["at"] = at
    case = Case(DistillSection.model_validate({"general": terms}), "general")
    labels = torch.full((ROWS, WIDTH), -100)
    positions, tokens = _long(case.targets["positions"]), _long(case.targets["tokens"])
    row, slot = np.nonzero(tokens.numpy() != -100)
    labels[row, positions[row, slot]] = tokens[row, slot]
    masked = labels != -100
    assert 5 < masked.sum() < REAL.sum()
    where = REAL if at == "real" else masked
    both = [(model.logits[where] / 2).log_softmax(-1) for model in (case.student, case.teacher)]
    soft = F.kl_div(*both, reduction="batchmean", log_target=True)
    last = [model.encoder.hidden[-1][REAL] for model in (case.student, case.teacher)]
    case.assert_parts(
        word_logits=(5, 4 * soft),
        masked_lm=(2, F.cross_entropy(case.student.logits[masked], labels[masked])),
        cosine=(1, (1 - F.cosine_similarity(*last)).mean()),
    )


def test_pkd():
    """As its code: KL as a mean over classes times T², patience without the last layer."""
    case = Case(DistillSection(preset="pkd"), "prediction", student=STUDENT_OF_FOUR)
    labels = _long(case.targets["labels"])
    goal = torch.softmax(case.teacher.logits / 5, -1)
    per_class = F.kl_div((case.student.logits / 5).log_softmax(-1), goal, reduction="none")
    soft = 25 * per_class.mean()
    first = [
        F.normalize(torch.stack([model.encoder.hidden[layer][:, 0] for layer in (1, 2, 3)]), dim=-1)
        for model in (case.student, case.teacher)
    ]
    label = F.cross_entropy(case.student.logits, labels)
    case.assert_parts(label=(0.5, label), soft=(0.5, soft), cls=(100, F.mse_loss(*first)))


@pytest.mark.parametrize(
    "stage, others",
    [
        ("general", []),
        ("general", [{"term": "masked_lm"}]),
        ("intermediate", []),
        ("prediction", [{"term": "logits"}]),
    ],
)
def test_pooled(stage, others):
    """Of a bare encoder, of a masked LM's and of a classifier's."""
    section = DistillSection.model_validate({stage: [{"term": "pooled"}, *others]})
    case = Case(section, stage)
    both = [getattr(model, "encoder", model).pooled for model in (case.student, case.teacher)]
    expected = (1 - F.cosine_similarity(*both)).mean()
    np.testing.assert_allclose(case.parts["loss/pooled"], expected, rtol=2e-5)
    encoder = case.grads["student"].get("encoder", case.grads["student"])
    assert all(leaf.any() and np.isfinite(leaf).all() for leaf in encoder["pooler"].values())


def test_the_same_term_twice_over_pairs_of_layers():
    terms = [
        {"term": "hidden", "layer_map": [[1, 1], [1, 2], [2, 4]]},
        {"term": "hidden", "layer_map": "last", "weight": {"start": 1.0, "end": 3.0}},
    ]
    case = Case(DistillSection.model_validate({"general": terms}), "general", share=0.25)
    ours, theirs = case.student.hidden, case.teacher.hidden  # equal widths: W = 1
    one = lambda i, g: F.mse_loss(ours[i][REAL], theirs[g][REAL])  # noqa: E731
    case.assert_parts(hidden=(1, one(1, 1) + one(1, 2) + one(2, 4)), hidden_2=(1.5, one(2, 4)))


def test_temperature_over_the_stage():
    ramp = {"term": "logits", "form": "kl", "temperature": {"start": 1.0, "end": 5.0}}
    case = Case(DistillSection.model_validate({"prediction": [ramp]}), "prediction", share=0.5)
    both = [(model.logits / 3).log_softmax(-1) for model in (case.student, case.teacher)]
    case.assert_parts(soft=(1, F.kl_div(*both, reduction="batchmean", log_target=True)))


@pytest.mark.parametrize("unroll", [False, True])
def test_pairs_of_heads(unroll, maps_read):
    pairs = {"term": "attention", "layer_map": "last", "head_map": [[1, 4], [2, 4], [3, 1]]}
    section = DistillSection.model_validate({"general": [pairs]})
    case = Case(section, "general", student=NARROW, unroll=unroll)
    assert not maps_read
    ours, theirs = (_scores(m.queries[-1], m.keys[-1]) for m in (case.student, case.teacher))
    gap = ours[:, [0, 1, 2]] - theirs[:, [3, 3, 0]]
    case.assert_parts(attention=(1, gap.square()[PAIR.expand_as(gap)].mean()))


def test_masked_input_is_the_same_for_both():
    """General distillation may mask its input; the terms are as they were."""
    case = Case(DistillSection(mask_rate=0.15), "general")
    embedding = F.mse_loss(case.student.hidden[0][REAL], case.teacher.hidden[0][REAL])
    np.testing.assert_allclose(case.parts["loss/embedding"], embedding, rtol=2e-5)
    assert not np.array_equal(case.value, Case(DistillSection(), "general").value)


def test_what_no_term_asks_for_is_not_there():
    section = DistillSection.model_validate(
        {"general": [{"term": "masked_lm"}, {"term": "hidden", "weight": 0}]}
    )
    assert [term.term for term in section.terms("general")] == ["masked_lm"]
    assert reads_of(section.terms("general")) == Reads(words=True, teacher=False)
    assert reads_of(section.terms("general"), of_teacher=True) == Reads(teacher=False)


def test_a_dumped_preset_says_its_terms_and_is_the_same_again():
    section = DistillSection(preset="pkd")
    dumped = section.model_dump(mode="json")
    assert [term["term"] for term in dumped["prediction"]] == ["label", "logits", "cls"]
    assert DistillSection.model_validate(dumped) == section


@pytest.mark.parametrize("at, num_words", [("real", 64 * 64), ("masked", 64 * 48)])
def test_no_more_than_a_chunk_of_word_logits_exists(at, num_words):
    """Of arrays as wide as the vocabulary, in the compiled step of teacher and student."""
    changes = {"vocab_size": 8192, "max_position_embeddings": 64}
    apply, init = make_masked_lm(TEACHER.model_copy(update=changes))
    role = Role(apply, Reads(words=True), TEACHER.num_hidden_layers)
    terms = [{"term": "word_logits", "at": at}, {"term": "masked_lm"}]
    ids = {"mask_token_id": 4, "special_token_ids": (0, 1, 2), "vocab_size": 8192}
    assert masking.num_slots(0.5, 64) == 48
    rows = jnp.ones((64, 64), jnp.int32)
    batch = Batch(Text(rows, 0 * rows), rows > 0, {"labels": rows[:, 0]}, jnp.ones(64))

    def largest(chunk_size):
        objective = make_distill(
            role,
            role,
            DistillSection.model_validate({"general": terms}).terms("general"),
            Options(chunk_size=chunk_size),
            make_mask(mask_rate=0.5, **ids),
        )

        def step(student, teacher, key):
            prepared, counts = objective.prepare(batch, key, jnp.float32(0))
            goal = objective.targets(prepared, teacher)
            loss = jax.grad(objective.loss, has_aux=True)
            return loss({"student": student}, prepared, counts, key, goal)[0]

        params = jax.eval_shape(init, jax.random.key(0))
        program = jax.jit(step).lower(params, params, jax.random.key(0)).compile().as_text()
        shapes = re.findall(r"f32\[([\d,]+),8192\]", program)
        return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)

    assert largest(32) == 32
    assert largest(4096) == num_words
