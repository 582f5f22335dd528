"""Embeddings: rows and scores, packed against padded rows, and whole runs."""

import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tiny_inputs import STUDENT, TEACHER, TEXTS, write_inputs

from tinybert_jax import cli
from tinybert_jax.batches.batch import Plan, make_batch
from tinybert_jax.batches.bucketing import spread_texts
from tinybert_jax.batches.packing import packed_epochs
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.config.tasks import EmbeddingsTask
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import Reading, read_task
from tinybert_jax.data.wordpiece import train_wordpiece
from tinybert_jax.inference.predict import embed
from tinybert_jax.models.heads import make_sentence_encoder
from tinybert_jax.objectives.distillation import Options, Role, make_distill
from tinybert_jax.objectives.similarity import make_similarity
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.tasks.embeddings import EMBEDDINGS, make_embeddings
from tinybert_jax.tasks.task import Scored
from tinybert_jax.terms.table import reads_of

PAIRS = list(itertools.combinations(dict.fromkeys(TEXTS), 2))
SCORES = [2.0, 0.5, 1.0, 0.25, 1.5, 4.0]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=60)


# Reading and scores


def _table(folder, rows, name="rows.tsv"):
    file = folder / name
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return str(file)


def _scored_table(folder, copies=1):
    rows = [(f"{a} {n}", b, s) for n in range(copies) for (a, b), s in zip(PAIRS, SCORES)]  # noqa: B905
    return _table(folder, [("text", "text_pair", "label"), *rows], "scored.tsv")


def test_sentences_of_both_columns_and_of_more_files(tmp_path, tokenizer):
    scored = _scored_table(tmp_path, 4)
    more = [tmp_path / "one.txt", tmp_path / "two.en"]
    more[0].write_text("tea and jam\n\nthe sea\n")
    more[1].write_text("a film\n")
    section = EmbeddingsTask(
        train=scored,
        dev=scored,
        text_pair="text_pair",
        select_share=0.25,
        format="text",
        unlabelled=[str(file) for file in more],
    )
    data = read_task(section, EMBEDDINGS.read)
    assert len(data.train.text) == 18 and len(data.select.text) == 6 and len(data.dev.text) == 24
    assert data.select.labels is not None and data.dev.labels.tolist() == SCORES * 4
    assert sorted(data.distilled.text) == sorted(
        [*data.train.text, *data.train.text_pair, "tea and jam", "the sea", "a film"]
    )
    rows = EMBEDDINGS.encode(tokenizer, data.dev, 16)
    flat = [text for pair in zip(data.dev.text, data.dev.text_pair, strict=True) for text in pair]
    expected = [tokenizer(text)["input_ids"] for text in flat]
    assert [rows.part(i, i + 1).ids.tolist() for i in range(len(flat))] == expected
    np.testing.assert_array_equal(rows.labels, np.repeat(data.dev.labels, 2))


def test_triplets_are_three_rows_each(tmp_path, tokenizer):
    file = _table(tmp_path, [("a", "b", "c"), ("tea", "jam", "a sea"), ("a film", "film", "tea")])
    columns = {"text": "a", "text_pair": "b", "negative": "c"}
    section = EmbeddingsTask(train=file, dev=file, rows="triplets", **columns)
    examples = EMBEDDINGS.read(file, section, Reading())
    assert examples.take([1]).negatives == ["tea"] and section.texts_per_example == 3
    rows = EMBEDDINGS.encode(tokenizer, examples, 16)
    told = [tokenizer.decode(rows.part(i, i + 1).ids[1:-1]) for i in range(6)]
    assert told == ["tea", "jam", "a sea", "a film", "film", "tea"]


def test_scores_are_correlations_of_cosines():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    vectors, labels = draw.normal(size=(40, 8)).astype(np.float32), draw.random(20)
    examples = Examples(["x"] * 20, ["y"] * 20, labels, None)
    task = make_embeddings(widths=(3,))
    found = task.measure(Scored(vectors, None, examples), {})
    for name, width in (("spearman", 8), ("spearman_3", 3)):
        one, other = vectors[::2, :width], vectors[1::2, :width]
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = np.sum(one * other, axis=1) / lengths
        assert found[name] == pytest.approx(stats.spearmanr(cosines, labels)[0], abs=1e-6)
    assert set(found) == {"spearman", "pearson", "spearman_3"}
    answers = task.answers(Scored(vectors, None, examples), {})
    assert answers[3]["similarity"] == pytest.approx(
        np.sum(vectors[6] * vectors[7]) / np.linalg.norm(vectors[6]) / np.linalg.norm(vectors[7])
    )


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"rows": "pairs"}, "rows: pairs need the column text_pair"),
        ({"rows": "triplets", "text_pair": "b"}, "need the column negative"),
        ({"text_pair": "b", "negative": "c"}, "negative is a column of rows: triplets"),
        ({"rows": "pairs", "text_pair": "b", "unlabelled": "x.txt"}, "unlabelled is for rows"),
        ({"rows": "pairs", "text_pair": "b", "select_share": 0.1}, "needs pairs with scores"),
        ({"select_share": 0.1}, "needs pairs with scores in train: set text_pair"),
    ],
)
def test_settings_that_do_not_fit(settings, named):
    with pytest.raises(ValueError, match=named):
        EmbeddingsTask(train="a.tsv", dev="a.tsv", **settings)


def test_files_that_do_not_fit(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("tea\n")
    section = EmbeddingsTask(train=str(plain), dev=str(plain))
    with pytest.raises(ValueError, match="no column of a second text; set text_pair"):
        EMBEDDINGS.read(str(plain), section, Reading(is_dev=True))
    section = EmbeddingsTask(train=str(plain), dev=str(plain), dev_columns={"text_pair": "b"})
    with pytest.raises(ValueError, match="expected scores, got plain text"):
        EMBEDDINGS.read(str(plain), section, Reading(is_dev=True))


# Packed rows

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
NARROW = CONFIG.model_copy(update={"hidden_size": 16, "num_hidden_layers": 1})
TERMS = [
    {"term": "sentence", "mse": 0.5},
    {"term": "similarity", "temperature": 0.1},
    {"term": "contrastive", "weight": 0.3},
]


def _params(init, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), init(jax.random.key(0))
    )


def _rows_of_pairs(tokenizer):
    texts = [f"{a} and {b}" for a, b in PAIRS]
    pairs = Examples(texts, [b for _, b in PAIRS], np.array(SCORES, np.float32), None)
    return EMBEDDINGS.encode(tokenizer, pairs, 48)


def _batches(rows):
    """The six pairs in padded and in packed rows, both with filler."""
    epochs = packed_epochs(
        rows.lengths.reshape(-1, 2).sum(1), width=48, global_batch_size=6, seed=(0,), num_shards=4
    )
    (packed,) = spread_texts(epochs, 2).plan(0)
    assert sorted(packed.rows[packed.rows >= 0].tolist()) == list(range(12))
    assert (packed.rows < 0).any() and packed.rows.shape[1] > 2
    padded = Plan(np.array([*range(12), -1, -1]), 48)
    return [jax.tree.map(jnp.asarray, make_batch(rows, plan, 0)) for plan in (padded, packed)]


def _assert_same(objective, params, frozen, batches):
    def run(batch):
        batch, counts = objective.prepare(batch, jax.random.key(0), jnp.float32(0))
        differentiate = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
        return differentiate(params, batch, counts, None, objective.targets(batch, frozen))

    (value, parts), grads = run(batches[0])
    (same, same_parts), same_grads = run(batches[1])
    assert value > 0 and all(part > 0 for part in parts.values())
    np.testing.assert_allclose(same, value, rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(same_parts[name], part, rtol=1e-5, err_msg=name)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for one, two in zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_packed_rows_equal_padded_ones_and_so_do_gradients(tokenizer, pooling):
    """Of all terms at once, through a projection, with pairs and two widths."""
    section = DistillSection.model_validate({"prediction": TERMS})
    terms = section.terms("prediction")
    sizes = [own.model_copy(update={"vocab_size": len(tokenizer)}) for own in (NARROW, CONFIG)]
    (apply, init), (teacher_apply, teacher_init) = (
        make_sentence_encoder(own, pooling=pooling) for own in sizes
    )
    objective = make_distill(
        Role(apply, reads_of(terms), 1),
        Role(teacher_apply, reads_of(terms, of_teacher=True), 2),
        terms,
        Options(num_texts=2, widths=(8,)),
    )
    kernel = jax.random.normal(jax.random.key(4), (1, 16, 32))
    params = {
        "student": _params(init, 1),
        "projection": {"kernel": kernel, "bias": jnp.ones((1, 32))},
    }
    _assert_same(objective, params, _params(teacher_init, 2), _batches(_rows_of_pairs(tokenizer)))


@pytest.mark.parametrize("has_scores", [False, True])
def test_packed_pairs_are_trained_on_as_padded_ones(tokenizer, has_scores):
    apply, init = make_sentence_encoder(
        NARROW.model_copy(update={"vocab_size": len(tokenizer)}), pooling="mean"
    )
    objective = make_similarity(
        apply, num_texts=2, has_scores=has_scores, temperature=0.1, widths=(8,)
    )
    _assert_same(objective, _params(init, 1), (), _batches(_rows_of_pairs(tokenizer)))


# Runs

STAGE = {"num_steps": 4, "global_batch_size": 8, "max_length": 16, "learning_rate": 1e-2}


def _run(folder, task, **sections):
    tree = {
        "run_dir": str(folder / "run"),
        "teacher": {"path": str(folder / "teacher")},
        "student": STUDENT | {"init": "teacher_reduced"},
        "task": {"kind": "embeddings", "text_pair": "text_pair", **task},
        **sections,
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return ["run", str(config)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student that was distilled on sentences without labels."""
    folder = tmp_path_factory.mktemp("embeddings")
    write_inputs(folder, **TEACHER)
    scored = _scored_table(folder, 5)
    (folder / "more.txt").write_text("tea and jam\nthe sea\n")
    task = {
        "train": scored,
        "dev": scored,
        "select_share": 0.2,
        "unlabelled": [str(folder / "more.txt")],
        "widths": [4],
    }
    terms = {"prediction": [{"term": "sentence"}, {"term": "similarity"}]}
    command = _run(folder, task, distillation=terms, prediction=STAGE | {"batching": "pack"})
    assert cli.main(command) == 0
    return folder, scored


def test_a_run_without_labels_reports_the_correlation(world, capsys):
    folder, scored = world
    results = json.loads((folder / "run/results.json").read_text())
    by_role = {model["role"]: model for model in results["models"]}
    assert set(by_role) == {"teacher", "student"} and results["select_examples"] == 6
    assert set(by_role["student"]["metrics"]) == {"spearman", "pearson", "spearman_4"}
    assert results["label_names"] is None and results["differing"]["num_texts"] > 0
    assert not (folder / "run/hf/projection.safetensors").exists()
    columns = ["--text-pair", "text_pair"]
    assert cli.main(["evaluate", str(folder / "run/hf"), scored, *columns]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("spearman", "pearson"):
        assert found[name] == pytest.approx(by_role["student"]["metrics"][name], abs=1e-6)
    command = ["compare", str(folder / "run/hf"), str(folder / "run/hf"), scored, *columns]
    assert cli.main(command) == 0 and "broken" in capsys.readouterr().out


def test_the_folder_gives_the_same_vectors_in_transformers(world):
    """As sentence-transformers does it: mean over real tokens, then the length 1."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = world[0] / "run/hf"
    modules = json.loads((model / "modules.json").read_text())
    assert [own["path"] for own in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((model / "1_Pooling/config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    texts = [*dict.fromkeys(TEXTS), "tea " * 40]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    length = json.loads((model / "sentence_bert_config.json").read_text())["max_seq_length"]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        hidden = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(means, dim=-1).numpy()
    np.testing.assert_allclose(embed(str(model), texts), expected, atol=1e-5)
    narrow = expected[:, :4] / np.linalg.norm(expected[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(embed(str(model), texts, width=4), narrow, atol=1e-5)


def test_embed_writes_a_vector_per_text(world, tmp_path, capsys):
    folder, scored = world
    model, output = str(folder / "run/hf"), tmp_path / "vectors.npy"
    assert cli.main(["embed", model, scored, "-o", str(output)]) == 0
    told = capsys.readouterr()
    vectors = np.load(output)
    assert vectors.shape == (30, 8) and vectors.dtype == np.float32 and not told.out
    assert cli.main(["embed", model, str(folder / "more.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["tea and jam", "the sea"]
    np.testing.assert_allclose(np.linalg.norm(rows[0]["vector"]), 1, atol=1e-6)
    assert cli.main(["embed", model, scored, "-o", str(tmp_path / "vectors.txt")]) == 2
    assert "expected a .npy file" in capsys.readouterr().err
    assert cli.main(["embed", model, scored, "--width", "9"]) == 2
    assert "expected from 1 to 8" in capsys.readouterr().err
    assert cli.main(["embed", str(folder / "teacher"), scored]) == 2


def test_search_gives_the_closest_texts(world, tmp_path, capsys):
    folder, _ = world
    model = str(folder / "run/hf")
    faq = tmp_path / "faq.csv"
    faq.write_text('text,answer\na dull film,no\n"tea and toast","yes, tea"\na sea,blue\n')
    command = ["search", model, str(faq), "-q", "tea and toast", "-q", "a sea", "-k", "2"]
    assert cli.main([*command, "--label", "answer"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [own["question"] for own in found] == ["tea and toast", "a sea"]
    best = found[0]["results"][0]
    assert (best["row"], best["text"], best["label"]) == (2, "tea and toast", "yes, tea")
    assert best["score"] == pytest.approx(1, abs=1e-5) and found[1]["results"][0]["row"] == 3
    if importlib.util.find_spec("faiss"):
        for _ in range(2):
            assert cli.main([*command, "--label", "answer", "--index", str(tmp_path / "kept")]) == 0
            indexed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert [[r["row"] for r in own["results"]] for own in indexed] == [
                [r["row"] for r in own["results"]] for own in found
            ]
        (tmp_path / "kept" / "index.json").unlink()
        assert cli.main([*command, "--index", str(tmp_path / "kept")]) == 2
        assert "something else or damaged" in capsys.readouterr().err
    plain = tmp_path / "faq.txt"
    plain.write_text("a dull film\n\na sea\n")
    assert cli.main(["search", model, str(plain), "-q", "a sea"]) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [own["row"] for own in found["results"]][0] == 3 and len(found["results"]) == 2
    assert cli.main(["search", model, str(plain), "-q", " "]) == 2
    assert "a blank one in place 1" in capsys.readouterr().err


def test_pairs_train_a_teacher_and_a_student(tmp_path, capsys, cheap_programs):
    write_inputs(tmp_path, **TEACHER)
    scored = _scored_table(tmp_path)
    task = {"train": scored, "dev": scored, "rows": "pairs", "pooling": "first", "normalise": False}
    terms = {"prediction": [{"term": "contrastive"}, {"term": "sentence", "weight": 0.5}]}
    stage = STAGE | {"global_batch_size": 4}
    command = _run(tmp_path, task, distillation=terms, finetune=stage, prediction=stage)
    assert cli.main(command) == 0
    modules = json.loads((tmp_path / "run/hf/modules.json").read_text())
    assert [own["path"] for own in modules] == ["", "1_Pooling"]
    again = _run(tmp_path, task | {"pooling": "mean"}, distillation=terms, prediction=stage)
    folder = f"teacher.path={tmp_path / 'run/models/finetune'}"
    assert cli.main([*again, folder, f"run_dir={tmp_path / 'other'}"]) == 2
    assert "task.pooling: expected first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, terms, override, named",
    [
        ({}, [{"term": "logits"}], (), "embeddings have no classes: use sentence"),
        ({}, [{"term": "contrastive"}], (), "expected task.rows pairs or triplets, got sentences"),
        ({"widths": [4]}, [{"term": "sentence"}], (), "task.widths: expected a term contrastive"),
        ({"widths": [8]}, [{"term": "similarity"}], (), "widths below the student's hidden_size 8"),
        ({}, [{"term": "sentence"}], ("task.kind=regression",), "expected task.kind embeddings"),
        (
            {},
            [{"term": "sentence"}],
            ("prediction=null", "intermediate.num_steps=1", "intermediate.learning_rate=0.1"),
            "expected a stage that ends in vectors",
        ),
        (
            {},
            [{"term": "similarity"}],
            ("prediction.gradient_accumulation_steps=2",),
            "remove gradient_accumulation_steps",
        ),
        (
            {},
            [{"term": "sentence"}],
            ("baseline.learning_rate=0.1", "baseline.num_steps=1"),
            "rows",
        ),
    ],
)
def test_terms_that_do_not_fit(world, tmp_path, capsys, task, terms, override, named):
    folder, scored = world
    task = {"train": scored, "dev": scored, **task}
    command = _run(tmp_path, task, distillation={"prediction": terms}, prediction=STAGE)
    assert cli.main([*command, f"teacher.path={folder / 'teacher'}", *override]) == 2
    assert named in capsys.readouterr().err
