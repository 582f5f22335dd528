"""Which rows are held out: by the hash of the text, of documents and of labelled rows."""

import json

import numpy as np
import pytest

from tinybert_jax.config.task_kinds import TranslationTask
from tinybert_jax.config.tasks import ClassificationTask
from tinybert_jax.data import splits
from tinybert_jax.data.examples import Examples
from tinybert_jax.data.splits import split_heldout
from tinybert_jax.tasks.classification import CLASSIFICATION
from tinybert_jax.tasks.translation import TRANSLATION


def test_documents_are_held_out_by_the_hash_of_their_text():
    documents = [f"document {i % 900} of many" for i in range(1000)]
    kept, heldout = split_heldout(documents, 0.2)
    assert sorted((*kept, *heldout)) == sorted(documents) and not set(kept) & set(heldout)
    assert abs(len(set(heldout)) - 180) <= 3 * np.sqrt(900 * 0.2 * 0.8)
    assert list(kept) == [text for text in documents if text in set(kept)]
    more_kept, more_heldout = split_heldout(["another one", *documents[::-1]], 0.2)
    assert set(kept) <= set(more_kept) and set(heldout) <= set(more_heldout)
    assert set(heldout) <= set(split_heldout(documents, 0.3)[1])
    assert split_heldout(documents, 0.0) == (tuple(documents), ())


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="corpus.heldout_share: expected documents on both sides"):
        split_heldout(["one document"], 0.5)


def _task(tmp_path, rows, **settings):
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ClassificationTask.model_validate({"train": str(file), **settings})


def read_task(section):
    return splits.read_task(section, CLASSIFICATION.read)


def describe_labels(data):
    return splits.describe_labels(data, CLASSIFICATION.count_labels)


def test_dev_share_splits_labelled_rows_by_the_hash_of_their_text(tmp_path):
    rows = [
        {"text": f"text {i % 450}", "other": f"pair {i % 450}", "label": ["a", "b"][i % 2]}
        for i in range(1000)
    ]
    data = read_task(_task(tmp_path, rows, dev_share=0.2, text_pair="other"))
    train, dev = set(data.train.text), set(data.dev.text)
    assert len(data.train.text) + len(data.dev.text) == 1000 and not train & dev
    assert 200 <= len(data.dev.text) <= 202  # a text has two rows or three
    assert data.label_names == ("a", "b")
    for side in (data.train, data.dev):
        assert all(
            (int(text.split()[1]) % 2 == label, pair) == (True, text.replace("text", "pair"))
            for text, pair, label in zip(side.text, side.text_pair, side.labels, strict=True)
        )
    again = read_task(_task(tmp_path, rows[::-1], dev_share=0.2, text_pair="other"))
    assert set(again.dev.text) == dev
    cut = read_task(_task(tmp_path, rows, dev_share=0.2, text_pair="other", max_dev_rows=7))
    assert cut.dev.text == data.dev.text[:7] and cut.train.text == data.train.text


def test_select_share_takes_rows_of_train_that_are_left_after_dev_and_the_cut(tmp_path):
    rows = [{"text": f"text {i % 450}", "label": "ab"[i % 2]} for i in range(1000)]
    without = read_task(_task(tmp_path, rows, dev_share=0.2, max_train_rows=500))
    data = read_task(_task(tmp_path, rows, dev_share=0.2, max_train_rows=500, select_share=0.1))
    assert without.select is None and without.selection is without.dev
    assert data.selection is data.select and data.selection_name == "select"
    assert data.dev.text == without.dev.text
    assert sorted(data.train.text + data.select.text) == sorted(without.train.text)
    assert 50 <= len(data.select.text) <= 52
    assert not set(data.select.text) & (set(data.train.text) | set(data.dev.text))
    assert all(
        int(t.split()[1]) % 2 == n
        for t, n in zip(data.select.text, data.select.labels, strict=True)
    )
    assert f"{len(data.select.text)} that choose, 20" in describe_labels(data)
    with pytest.raises(ValueError, match="task.select_share: expected rows on both sides"):
        read_task(_task(tmp_path, rows[:2], dev_share=0.5, select_share=0.5))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["yes", "no"], None),
        ([f"{i}.0" for i in range(12)], None),
        (["NaN", "yes", "no"], "look like missing values: 'NaN'"),
        ([f"{i / 8:.3f}" for i in range(12)], "most of the 12 labels are numbers with a fraction"),
        (["yes"] * 5 + ["no"] * 4 + ["rare"], "labels of one or two rows: 'rare' 2"),
    ],
)
def test_labels_that_look_like_mistakes_are_told(tmp_path, labels, told):
    size = 2 if told and "one or two" in told else 4
    rows = [{"text": f"{i} {label}", "label": label} for i, label in enumerate(labels * size)]
    rows += [{"text": "dev", "label": labels[0]}]
    data = read_task(_task(tmp_path, rows, dev_share=1e-9))  # one row
    notes = splits.data_notes(data, CLASSIFICATION.count_labels)
    assert [told in note for note in notes] == [True] if told else notes == []


def test_labels_of_an_update_are_rare_where_the_old_model_does_not_know_them():
    names, is_old = ("known", "new", "gone"), np.array([True, False, False, False])
    labels = np.array([0, 0, 1, 1], np.int32)
    train = Examples(["x"] * 4, None, labels, names, is_old=is_old)
    dev = train._replace(text=["y"] * 4, labels=labels + 1)
    absent, rare = splits.data_notes(splits.TaskData(train, dev), CLASSIFICATION.count_labels)
    assert absent.endswith("'gone' (2 in dev); the model may forget it: give more old rows")
    assert rare.startswith("labels of one or two rows: 'new' 2; nobody learns")


def test_dev_rows_that_are_trained_on_are_told(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], *rows[:1]]))
    data = read_task(_task(tmp_path, rows, dev=str(dev)))
    told = "task: 4 of the 4 in dev are also among those to train on; their scores say little"
    assert told in describe_labels(data)
    apart = read_task(_task(tmp_path, rows, dev_share=0.2))
    assert "are also among" not in describe_labels(apart)


def test_a_source_is_on_one_side_with_all_its_translations(tmp_path):
    pairs = [{"text": f"source {i % 100}", "target": f"target {i}"} for i in range(300)]
    pairs += [{"text": f"once {i}", "target": f"target {i}"} for i in range(50)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    given = {"train": str(file), "text": "text", "target": "target", "dev_share": 0.1}
    section = TranslationTask.model_validate({**given, "select_share": 0.1})
    data = splits.read_task(section, TRANSLATION.read)
    parts = [set(part.text) for part in (data.train, data.dev, data.select)]
    assert len(set.union(*parts)) == 150 == sum(map(len, parts))


def test_a_dev_share_of_few_rows_is_that_share(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    assert len(read_task(_task(tmp_path, rows, dev_share=0.1)).dev.text) == 4
    assert len(read_task(_task(tmp_path, rows[:3], dev_share=0.1)).dev.text) == 1


def test_a_dev_file_may_name_its_columns_otherwise(tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tclass\nfine\t1\nawful\t0\n")
    rows = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    data = read_task(
        _task(
            tmp_path,
            rows,
            dev=str(tmp_path / "dev.tsv"),
            dev_columns={"text": "sentence", "label": "class"},
            labels={"neg": "bad", "pos": "good", "0": "bad", "1": "good"},
        )
    )
    assert data.label_names == ("bad", "good")
    assert data.train.labels is not None and data.train.labels.tolist() == [1, 0]
    assert data.dev.text == ["fine", "awful"] and data.dev.labels.tolist() == [1, 0]


def test_a_dev_share_that_leaves_a_side_empty_is_refused(tmp_path):
    rows = [{"text": "same", "label": label} for label in "ab"]
    with pytest.raises(ValueError, match="task.dev_share: expected rows on both sides"):
        read_task(_task(tmp_path, rows, dev_share=0.5))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dev": "dev.tsv", "dev_share": 0.1},
        {"dev_split": "validation", "dev_share": 0.1},
        {"dev_columns": {"label": "class"}, "dev_share": 0.1},
    ],
)
def test_dev_comes_from_one_place(settings):
    words = "dev or dev_share|one of dev and dev_share|remove dev_(split|columns)"
    with pytest.raises(ValueError, match=words):
        ClassificationTask.model_validate({"train": "train.tsv", **settings})


def test_labels_are_told_with_what_may_be_mistakes(tmp_path):
    labels = ["cards"] * 30 + ["loans"] * 9 + ["Loans "] * 3
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "dev.jsonl").write_text('{"text": "one", "label": "loans"}\n')
    whole = _task(tmp_path, rows, dev=str(tmp_path / "dev.jsonl"))
    counts, alike = describe_labels(read_task(whole)).split("\n")
    told = "task: 42 rows to train on, 1 in dev, of 3 labels: 'cards' 30, 'loans' 9, 'Loans ' 3"
    assert counts == told and "'Loans ' and 'loans'; task.labels can" in alike
    joined = {"cards": "cards", "loans": "loans", "Loans ": "loans"}  # as it says
    joined_task = read_task(whole.model_copy(update={"labels": joined}))
    assert describe_labels(joined_task).endswith("of 2 labels: 'cards' 30, 'loans' 12")
    cut = whole.model_copy(update={"max_train_rows": 30, "labels": ("cards", "loans", "Loans ")})
    assert "no row to train on has the label 'loans' (1 in dev), 'Loans ' (0 in dev)" in (
        describe_labels(read_task(cut))
    )


def test_many_labels_are_told_in_a_few_words(tmp_path):
    rows = [{"text": f"text {i}", "label": f"{i % 40} {'long ' * 50}"} for i in range(120)]
    told = describe_labels(read_task(_task(tmp_path, rows, dev_share=0.1)))
    assert "and 32 more" in told and len(told) < 1000


@pytest.mark.parametrize("num_labels, num_rows", [(37, 40), (19, 19)])
def test_labels_that_nearly_every_row_has_for_itself_are_refused(tmp_path, num_labels, num_rows):
    rows = [{"text": f"text {i}", "label": f"id {i % num_labels}"} for i in range(num_rows)]
    if num_rows < 20:
        assert len(read_task(_task(tmp_path, rows, dev_share=0.1)).label_names) == num_labels
        return
    with pytest.raises(ValueError, match="expected labels that rows share, got 37 in the 40 rows"):
        read_task(_task(tmp_path, rows, dev_share=0.1))
    listed = {"labels": [f"id {i}" for i in range(num_labels)]}
    assert len(read_task(_task(tmp_path, rows, dev_share=0.1, **listed)).label_names) == 37
    one_less = [row | {"label": row["label"].replace("id 36", "id 35")} for row in rows]
    assert len(read_task(_task(tmp_path, one_less, dev_share=0.1)).label_names) == 36


@pytest.mark.parametrize(
    ("name", "header", "fix"),
    [
        ("rows.csv", "body|label", "separated by '|'"),
        ("rows.tsv", "body;label", "name it .csv"),
        ("rows.csv", "body\tlabel", "name it .tsv"),
        ("rows.tsv", "body,label", "name it .csv"),
        ("rows.csv", "good; really good,1", "without a header give '0'"),
    ],
)
def test_columns_that_are_parted_otherwise_are_named(tmp_path, name, header, fix):
    (tmp_path / name).write_text(f"{header}\nfine;1\n")
    section = ClassificationTask(train=str(tmp_path / name), dev_share=0.5, text="body")
    with pytest.raises(ValueError, match="expected a column 'body'") as raised:
        read_task(section)
    assert fix in str(raised.value)
    assert ("separated by" in str(raised.value)) == ("really" not in header)
