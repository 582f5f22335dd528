"""Two model folders on the same text, through the command line, with every exit status."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_inputs import LABELS, TEACHER, TEXTS, write_inputs

from tinybert_jax import cli
from tinybert_jax.huggingface.folder import save_model
from tinybert_jax.huggingface.head import Head
from tinybert_jax.inference.predict import predict
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.report import comparison

NAMES = ("neg", "pos")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders of random weights, whose labels stand in different orders, and a file of rows."""
    folder = tmp_path_factory.mktemp("models")
    _, config, tokenizer = write_inputs(folder, **TEACHER)
    for number, names in enumerate((NAMES, NAMES[::-1])):
        params = make_classifier(config, 2)[1](jax.random.key(number))
        params["classifier"] = jax.tree.map(lambda leaf: 30 * leaf, params["classifier"])
        head = Head("SequenceClassification", "single_label_classification", names)
        save_model(folder / f"model{number}", params, config, tokenizer, head=head)
    pairs = enumerate(zip(TEXTS, LABELS, strict=True))
    rows = [f"{text} {n}\t{label}\t{n % 3}" for n, (text, label) in pairs]
    (folder / "data.tsv").write_text("text\tlabel\tgroup\n" + "\n".join(rows) + "\n")
    return str(folder / "model0"), str(folder / "model1"), str(folder / "data.tsv")


def _right(model, data):
    lines = [line.split("\t") for line in Path(data).read_text().splitlines()[1:]]
    found = predict(model, [text for text, *_ in lines])
    return np.array([own["label"] == line[1] for own, line in zip(found, lines, strict=True)])


def test_the_counts_are_those_of_the_predictions(models, tmp_path, capsys):
    old, new, data = models
    file = tmp_path / "found.json"
    assert cli.main(["compare", old, new, data, "--by", "group", "-o", str(file)]) == 0
    found = json.loads(file.read_text())
    one, two = _right(old, data), _right(new, data)
    assert found["pairs"] == {
        "both": int((one & two).sum()),
        "fixed": int((~one & two).sum()),
        "broken": int((one & ~two).sum()),
        "neither": int((~one & ~two).sum()),
    }
    assert found["churn"] == np.mean(one != two)  # with two labels
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["old"] == one.mean() and accuracy["new"] == two.mean()
    low, high = accuracy["interval"]
    assert low <= accuracy["difference"] <= high
    assert {row["name"] for row in found["by"]["groups"]} == {"0", "1", "2"}
    for key, total in found["pairs"].items():
        assert sum(row[key] for row in found["by"]["groups"]) == total
    assert [row["row"] - 1 for row in found["broken"]] == np.flatnonzero(one & ~two).tolist()
    shown = capsys.readouterr().out
    assert f"broken {found['pairs']['broken']}" in shown and "by group:" in shown
    assert ("more: -o comparison.html" in shown) == (len(found["broken"]) > 5)
    first = comparison.lines(found, num_texts=1)
    assert f"  … and {len(found['broken']) - 1} more: -o comparison.html" in first[-1]


def test_the_column_of_text_is_found(models, tmp_path, capsys):
    old, new, data = models
    file = tmp_path / "reviews.tsv"
    file.write_text(Path(data).read_text().replace("text\t", "review\t", 1))
    assert cli.main(["compare", old, new, str(file)]) == 0
    told = capsys.readouterr()
    assert "text in column 'review'; if not: --text" in told.err
    assert cli.main(["compare", old, new, data]) == 0
    expected = capsys.readouterr()
    assert told.out == expected.out and "in column" not in expected.err


def test_the_gate(models, tmp_path, capsys):
    old, new, data = models
    assert cli.main(["compare", old, new, data, "--max-regressions", "99%"]) == 0
    assert "allowed: the bound is not above 99.00%" in capsys.readouterr().out
    assert cli.main(["compare", old, old, data, "--max-regressions", "0.5%"]) == 3
    told = capsys.readouterr().out
    assert "24 examples are too few to tell; with none broken the bound is below 0.50% from" in told
    page = tmp_path / "found.html"
    assert cli.main(["compare", old, old, data, "--max-regressions", "0.2", "-o", str(page)]) == 0
    assert "<h2>Scores</h2>" in page.read_text() and "allowed" in page.read_text()


def test_what_cannot_be_compared(models, tmp_path, capsys):
    old, new, data = models
    (tmp_path / "more.tsv").write_text(Path(data).read_text() + "a text\tnobody\t0\n")
    for arguments, message in (
        ((old, new, str(tmp_path / "more.tsv")), f"{old} does not know all labels: "),
        ((old, new, data, "--by", "colour"), "expected a column 'colour'"),
        ((old, new, data, "-o", str(tmp_path / "found.txt")), "expected a .json or .html file"),
        ((old, str(tmp_path), data), "config.json"),
    ):
        assert cli.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["compare", old, new, data, "--max-regressions", "5"])
    assert "expected a share between 0 and 1, as 0.5% or 0.005" in capsys.readouterr().err
