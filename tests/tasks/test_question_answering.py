"""Question answering: windows, the loss against PyTorch, the best answer, and a whole run."""

import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.config.tasks import QuestionAnsweringTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading, read_task
from tinybert_jax.data.squad import Answer
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.huggingface.folder import save_model, start_params
from tinybert_jax.huggingface.head import Head
from tinybert_jax.inference.scorer import make_scorer
from tinybert_jax.metrics.spans import answer_scores, words_of
from tinybert_jax.models.heads import make_span_scorer
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks import question_answering
from tinybert_jax.tasks.question_answering import QUESTION_ANSWERING
from tinybert_jax.tasks.task import Scored
from tinybert_jax.terms.logits import LogitsTerm
from tinybert_jax.terms.term import Reads

TEXT = "tea and toast and jam and tea with a fine film by a sea"
QUESTIONS = ["a film", "jam and tea", "toast"]
ANSWERS = [
    (Answer("fine film", TEXT.index("fine")),),
    (Answer("tea", 0), Answer("tea", TEXT.rindex("tea"))),
    (),
]
EXAMPLES = Examples(QUESTIONS, [TEXT, TEXT, "a sea"], ANSWERS, ("start", "end"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([*TEXTS, TEXT], vocab_size=80)


def _rows_of(rows):
    return [rows.part(place, place + 1) for place in range(len(rows.lengths))]


# Windows


def test_a_short_text_is_one_window(tokenizer):
    rows = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES, 64)
    assert rows.windows.examples.tolist() == [0, 1, 2] and rows.num_truncated == 0
    for place, row in enumerate(_rows_of(rows)):
        pair = tokenizer(QUESTIONS[place], EXAMPLES.text_pair[place])
        assert row.ids.tolist() == pair["input_ids"]
        assert row.second[0] == pair["token_type_ids"].index(1)
        inside = [0, *range(row.second[0], len(row.ids) - 1)]
        assert np.flatnonzero(row.is_unit).tolist() == inside
        first, last = row.labels.argmax(0)
        start, end = row.windows.chars[first, 0], row.windows.chars[last, 1]
        gold = ANSWERS[place][0].text if ANSWERS[place] else ""
        assert EXAMPLES.text_pair[place][start:end] == gold and row.labels.sum() == 2


@pytest.mark.parametrize("max_length", [12, 16, 21])
def test_windows_overlap_and_together_hold_the_text(tokenizer, max_length):
    rows = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES, max_length)
    whole = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES, 64)
    for example, full in enumerate(_rows_of(whole)):
        own = [r for r in _rows_of(rows) if r.windows.examples[0] == example]
        texts = [r.windows.chars[np.flatnonzero(r.is_unit)[1:]].tolist() for r in own]
        wanted = full.windows.chars[np.flatnonzero(full.is_unit)[1:]].tolist()
        merged = []
        for text in texts:
            common = len([pair for pair in text if pair in merged])
            assert merged[len(merged) - common :] == text[:common]
            assert not merged or common >= min(max_length // 3, len(text) // 2)
            merged += text[common:]
        assert merged == wanted
        for row in own:
            assert len(row.ids) <= max_length
            has_answer = row.labels[0].sum() == 0
            held = [tuple(pair) for pair in row.windows.chars.tolist()]
            if has_answer:
                first, last = row.labels.argmax(0)
                answer = ANSWERS[example][0]
                assert (held[first][0], held[last][1]) == (
                    answer.start,
                    answer.start + len(answer.text),
                )
            else:
                assert row.labels[0].tolist() == [1, 1]


def test_a_long_question_is_cut_at_half_and_counted(tokenizer):
    examples = Examples(["tea " * 40], ["a sea"], None, None)
    rows = QUESTION_ANSWERING.encode(tokenizer, examples, 16)
    assert rows.num_truncated == 1 and rows.labels is None
    assert rows.second[0] == 8 + 2 and len(rows.ids) <= 16
    assert len(QUESTION_ANSWERING.encode(tokenizer, examples, 8).lengths) >= 1
    with pytest.raises(ValueError, match="expected at least 8 tokens for a question and a part"):
        QUESTION_ANSWERING.encode(tokenizer, examples, 7)


@pytest.mark.skipif("TINYBERT_DATA" not in os.environ, reason="needs TINYBERT_DATA")
def test_answers_of_squad_can_be_recovered_from_windows():
    """At least 99.5 % of the first 1,500 questions' answers, at 384 tokens with 128 in common."""
    path = Path(os.environ["TINYBERT_DATA"]) / "qa/squad/dev-v2.0-cs224n-half.json"
    section = QuestionAnsweringTask(train=str(path), dev=str(path))
    examples = QUESTION_ANSWERING.read(str(path), section, Reading()).take(slice(1500))
    tokenizer = train_wordpiece(list(dict.fromkeys(examples.text_pair)), vocab_size=4000)
    rows = QUESTION_ANSWERING.encode(tokenizer, examples, 384)
    recovered = set()
    for row in _rows_of(rows):
        example = int(row.windows.examples[0])
        first, last = row.labels.argmax(0)
        start, end = row.windows.chars[first, 0], row.windows.chars[last, 1]
        golds = examples.labels[example]
        if golds and words_of(examples.text_pair[example][start:end]) == words_of(golds[0].text):
            recovered.add(example)
    assert len(recovered) >= 0.995 * sum(map(bool, examples.labels)) > 500


def test_questions_about_one_article_are_on_one_side(tmp_path):
    data = [
        {
            "title": f"article {article}",
            "paragraphs": [
                {
                    "context": f"{TEXT} {article}",
                    "qas": [
                        {"question": f"{q} {n}", "answers": [{"text": "tea", "answer_start": 0}]}
                        for n, q in enumerate(QUESTIONS)
                    ],
                }
            ],
        }
        for article in range(20)
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": data}))
    section = QuestionAnsweringTask(train=str(file), dev_share=0.2, select_share=0.2)
    found = read_task(section, QUESTION_ANSWERING.read)
    sides = [set(part.groups) for part in (found.train, found.dev, found.select)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert sum(map(len, sides)) == 20

    section = QuestionAnsweringTask(train=str(file), dev_share=0.01)
    one = json.dumps({"data": data[:1]})
    file.write_text(one)
    with pytest.raises(
        ValueError,
        match="several articles or texts, .*, got 3 about 1; give more texts, or a file as dev",
    ):
        read_task(section, QUESTION_ANSWERING.read)


# The model and its loss


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = ModelConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256, **TEACHER
    )
    apply, init = make_span_scorer(sizes)
    params = jax.jit(init)(jax.random.key(0))
    params["spans"] = jax.tree.map(lambda leaf: 50 * leaf, params["spans"])
    return apply, params, sizes


def _loss(objective, params, batch, frozen=()):
    def loss_of(params, batch, frozen):
        given, counts = objective.prepare(batch, jax.random.key(1), jnp.float32(0))
        targets = objective.targets(given, frozen)
        return objective.loss(params, given, counts, None, targets)[0]

    return jax.jit(jax.value_and_grad(loss_of))(params, batch, frozen)


@pytest.mark.parametrize("max_length", [16, 64])
def test_the_loss_is_that_of_torch_packed_or_padded_with_the_same_gradients(
    model, tokenizer, max_length
):
    torch = pytest.importorskip("torch")
    apply, params, _ = model
    rows = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES, max_length)
    places = np.arange(len(rows.lengths))
    padded = make_batch(rows, Plan(np.append(places, -1), 64), tokenizer.pad_token_id)
    order = np.append(places, -1 * np.ones(len(places) % 2, int)).reshape(2, -1)
    packed = make_batch(rows, Plan(order, 256), tokenizer.pad_token_id)
    objective = make_supervised(apply, form=QUESTION_ANSWERING.form)
    loss, gradients = _loss(objective, params, padded)
    again, others = _loss(objective, params, packed)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)

    score = make_scorer(apply, buckets=(64,), pad_token_id=tokenizer.pad_token_id)
    logits = torch.tensor(score(params, rows))
    expected = []
    for start, stop in itertools.pairwise(rows.offsets):
        own = logits[start:stop].masked_fill(~torch.tensor(rows.is_unit[start:stop, None]), -1e9)
        gold = torch.tensor(rows.labels[start:stop].argmax(0))
        expected.append(torch.nn.functional.cross_entropy(own.T, gold))
    np.testing.assert_allclose(loss, torch.stack(expected).mean(), rtol=1e-5)


def test_a_teacher_s_starts_and_ends_are_learnt_over_the_tokens_of_their_window(model, tokenizer):
    torch = pytest.importorskip("torch")
    apply, params, _ = model
    teacher = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    rows = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES._replace(labels=None), 24)
    score = make_scorer(apply, buckets=(64,), pad_token_id=tokenizer.pad_token_id)
    ours, theirs = (torch.tensor(score(p, rows)) for p in (params, teacher))
    rows = rows._replace(teacher_logits=theirs.numpy())
    plan = Plan(np.append(np.arange(len(rows.lengths)), -1)[None], 256)
    batch = make_batch(rows, plan, tokenizer.pad_token_id)
    read = Reads(task_logits=True)
    term = LogitsTerm(term="logits", form="kl", temperature=2.0)
    objective = make_distill(Role(apply, read, 2), Role(apply, read, 2), (term,), Options())
    loss, _ = _loss(objective, {"student": params}, batch)
    expected = []
    for start, stop in itertools.pairwise(rows.offsets):
        kept = torch.tensor(rows.is_unit[start:stop])
        one, two = (own[start:stop][kept].T / 2.0 for own in (ours, theirs))
        expected.append(
            torch.nn.functional.kl_div(
                one.log_softmax(-1), two.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        )
    np.testing.assert_allclose(loss, torch.stack(expected).mean(), rtol=1e-4)
    # The teacher in the step gives the same as its kept logits.
    in_step = make_batch(rows._replace(teacher_logits=None), plan, tokenizer.pad_token_id)
    other, _ = _loss(objective, {"student": params}, in_step, teacher)
    np.testing.assert_allclose(loss, other, rtol=1e-5)


def test_transformers_has_the_same_logits_both_ways(model, tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    apply, params, sizes = model
    head = Head("QuestionAnswering", None, ("start", "end"), {"no_answer_threshold": 1.5})
    folder = save_model(tmp_path / "ours", params, sizes, tokenizer, head=head)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    pair = tokenizer(QUESTIONS[0], TEXT, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**pair)
    rows = QUESTION_ANSWERING.encode(tokenizer, EXAMPLES.take([0]), 64)
    score = make_scorer(apply, buckets=(64,), pad_token_id=tokenizer.pad_token_id)
    logits = score(params, rows)
    np.testing.assert_allclose(logits[:, 0], output.start_logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[:, 1], output.end_logits[0], atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    _, init = make_span_scorer(sizes)
    again = start_params(tmp_path / "theirs", init, whole=True)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)


# Answers


def _scored(tokenizer, spans, *, none=0.0, max_length=16, examples=EXAMPLES):
    """A model that gives the texts in `spans` {example: (text, score)} that score, others −5."""
    rows = QUESTION_ANSWERING.encode(tokenizer, examples, max_length)
    logits = np.full((len(rows.ids), 2), -5.0, np.float32)
    for place, example in enumerate(rows.windows.examples.tolist()):
        part = slice(rows.offsets[place], rows.offsets[place + 1])
        logits[part.start] = none / 2
        text, score = spans.get(example, ("", 0))
        start = examples.text_pair[example].find(text)
        chars = rows.windows.chars[part]
        inside = np.flatnonzero((chars[:, 0] >= start) & (chars[:, 1] <= start + len(text)))
        inside = inside[rows.is_unit[part][inside] & (inside > 0)]
        if text and inside.size and chars[inside[0], 0] == start:
            logits[part.start + inside[0], 0] = score / 2
            if chars[inside[-1], 1] == start + len(text):
                logits[part.start + inside[-1], 1] = score / 2
    return Scored(logits, rows, examples)


def test_the_best_part_of_all_windows_is_the_answer(tokenizer):
    scored = _scored(tokenizer, {0: ("fine film", 4.0), 1: ("tea", 6.0), 2: ("sea", 2.0)})
    found = QUESTION_ANSWERING.answers(scored, {})
    assert [own["answer"] for own in found] == ["fine film", "tea", "sea"]
    for own, text in zip(found, EXAMPLES.text_pair, strict=True):
        assert text[own["start"] : own["end"]] == own["answer"]
        assert 0 < own["probability"] <= 1
        shares = [candidate["probability"] for candidate in own["candidates"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
    json.dumps(found, allow_nan=False)
    outcomes = QUESTION_ANSWERING.outcomes(scored, {})
    assert outcomes.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert QUESTION_ANSWERING.measure(scored, {}) == {
        "f1": 2 / 3,
        "exact_match": 2 / 3,
        "f1_answerable": 1.0,
        "unanswerable": 0.0,
    }


def test_the_threshold_is_the_one_with_the_best_f1(tokenizer):
    """Against a search of all of them, over answers of many scores."""
    draw = np.random.default_rng(0)
    examples = EXAMPLES.take([place % 3 for place in range(24)])
    texts = ["fine film", "tea", "sea"]
    spans = {
        place: (texts[place % 3] if draw.random() < 0.8 else "a", float(draw.normal()))
        for place in range(24)
    }
    scored = _scored(tokenizer, spans, none=0.3, examples=examples)
    chosen = QUESTION_ANSWERING.tune(scored)

    def f1(threshold):
        return QUESTION_ANSWERING.measure(scored, {"no_answer_threshold": float(threshold)})["f1"]

    best = max(f1(threshold) for threshold in np.linspace(-12, 12, 481))
    assert QUESTION_ANSWERING.measure(scored, chosen)["f1"] == pytest.approx(best)
    answered = [place for place, golds in enumerate(examples.labels) if golds]
    always = scored.examples.take(answered)
    with_answers = _scored(tokenizer, spans, examples=always)
    assert QUESTION_ANSWERING.tune(with_answers) == {}


def test_no_answer(tokenizer):
    scored = _scored(tokenizer, {0: ("fine film", 4.0), 2: ("sea", 2.0)}, none=3.0)
    found = QUESTION_ANSWERING.answers(scored, {"no_answer_threshold": 0.0})
    assert [own["answer"] for own in found] == ["fine film", "", ""]
    assert found[1]["start"] is None and found[1]["probability"] > 0.5
    empty = Examples(["tea"], [""], None, None)
    rows = QUESTION_ANSWERING.encode(tokenizer, empty, 16)
    (none,) = QUESTION_ANSWERING.answers(
        Scored(np.zeros((len(rows.ids), 2), np.float32), rows, empty), {}
    )
    assert (none["answer"], none["probability"], none["candidates"]) == ("", 1.0, [])


def test_an_answer_has_at_most_thirty_tokens():
    logits = np.zeros((100, 2), np.float32)
    logits[10, 0] = logits[60, 1] = 50.0
    logits[20, 0], logits[49, 1] = 9.0, 9.0
    best = max(question_answering._best_pairs(logits))
    assert best == (59.0, 31, 60) or best[0] == 50.0
    assert all(last - first < 30 for _, first, last in question_answering._best_pairs(logits))


# A run

STAGE = {"num_steps": 4, "global_batch_size": 4, "max_length": 16, "learning_rate": 1e-2}


def test_a_whole_run_predicts_as_it_was_evaluated(tmp_path, capsys, cheap_programs):
    write_inputs(tmp_path, **TEACHER)
    rows = [
        {
            "question": f"{QUESTIONS[place % 2]} {place}",
            "context": TEXT,
            "answers": [{"text": a.text, "answer_start": a.start} for a in ANSWERS[place % 3]],
        }
        for place in range(24)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = STAGE | {"batching": "pack", "trained_words": "used"}
    tree = {
        "run_dir": str(tmp_path / "run"),
        "teacher": {"path": str(tmp_path / "teacher")},
        "student": STUDENT | {"init": "teacher_reduced", "num_attention_heads": 2},
        "task": {"kind": "question_answering", "train": str(file), "dev": str(file)},
        "distillation": {"teacher_margin": -1},
        **dict.fromkeys(("finetune", "intermediate", "prediction", "baseline"), stage),
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert cli.main(["run", str(config)]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {model["role"] for model in results["models"]} == {"teacher", "student", "baseline"}
    folder = tmp_path / "run/hf"
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace('"FOLDER"', repr(str(folder))), names)  # what the card says of transformers
    assert isinstance(names["answer"], str)
    told = (tmp_path / "run/hf/config.json").read_text()
    assert "BertForQuestionAnswering" in told and "no_answer_threshold" in told
    capsys.readouterr()
    student = next(m for m in results["models"] if m["role"] == "student")
    assert cli.main(["evaluate", str(tmp_path / "run/hf"), str(file)]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["f1"] == pytest.approx(student["metrics"]["f1"], abs=1e-6)
    assert cli.main(["predict", str(tmp_path / "run/hf"), str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    f1 = [
        answer_scores(line["answer"], [a["text"] for a in row["answers"]])[1]
        for line, row in zip(lines, rows, strict=True)
    ]
    assert np.mean(f1) == pytest.approx(measured["f1"])

    (tmp_path / "text.txt").write_text(TEXT)
    asked = [part for row in rows[:2] for part in ("-q", row["question"])]
    assert cli.main(["ask", str(tmp_path / "run/hf"), str(tmp_path / "text.txt"), *asked]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [own["answer"] for own in again] == [line["answer"] for line in lines[:2]]
    assert cli.main(["ask", str(tmp_path / "teacher"), str(tmp_path / "text.txt"), *asked]) == 2
    assert "expected a model with a head for a task" in capsys.readouterr().err
