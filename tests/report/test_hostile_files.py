"""The report of any run folder: a page or one ValueError, whatever its files hold."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st
from report_page import Page, eval_rows, make_model, make_results, render, train_rows

from tinybert_jax.report.console import json_line, printable
from tinybert_jax.report.page import write_report

HOSTILE = "\x1b]0;owned\x07\x1b[2J<script>\u202e\x9b31m\ud800\x00"
DEEP = "[" * 100_000 + "]" * 100_000

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 0, 5e-324, 1.7e308, -1.7e308, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=5)
    | st.just(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def _places(value, path=()):
    """The path of every value inside of a value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _places(inner, (*path, key))


def _replace(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replace(copy[path[0]], path[1:], new)
    return copy


def _full_results():
    bounds = {"intervals": {"accuracy": [0.8, 0.9]}}
    mistakes = [{"true": 0, "predicted": 1, "count": 3, "support": 9}]
    scores = [{"name": "PER", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}]
    models = [
        make_model("teacher", 0.9, 1.0, **bounds, per_class=scores),
        make_model("student", 0.8, 8.0, name="a", mistakes=mistakes, **bounds),
        make_model("student", 0.7, 9.0, name="b", per_class=scores, **bounds),
        make_model("baseline", 0.7, 8.0, name="a", deviation={"accuracy": 0.1}, by_seed=[{}, {}]),
    ]
    for model in models:
        model["translations"] = [{"source": "s", "reference": "r", "translation": "t"}]
    lines = {"confidence": [0.5], "accuracy": [0.5], "count": [9], "error": 0.1}
    models[0]["calibration"] = models[1]["calibration"] = lines
    closed = {"gap_closed": {"value": 0.5}, "baseline": {"difference": 0.1, "interval": [0, 0.2]}}
    differing = {"num_texts": 1, "texts": [{"text": "t", "label": "l"}], "student": "a"}
    counts = {name: 1 for name in ("both", "fixed", "broken", "neither")}
    counts |= {"broken_bound": 0.1, "mcnemar_p": 1.0}
    broken = {"text": "t", "label": "l", "old": "l", "new": "n"}
    return make_results(
        models=models,
        comparisons={"a": closed},
        differing=differing,
        advice=["a line"],
        stages={"prediction": {"num_evals": 1}},
        heldout={"perplexity": 3.0},
        share_kept={"a": 0.9, "b": 0.8},
        select_examples=3,
        update={
            "old": "m",
            "dev": {"old": counts, "new": counts, "new_labels": counts},
            "reasons": ["r"],
            "broken": [broken],
        },
    )


PLACES = list(_places(_full_results()))


@hypothesis.settings(max_examples=120)
@hypothesis.given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), max_size=3))
def test_any_value_anywhere_in_results_gives_a_page(tmp_path_factory, changes):
    results = _full_results()
    for path, new in sorted(changes, key=lambda change: -len(change[0])):
        results = _replace(results, path, new)
    folder = tmp_path_factory.mktemp("run")
    if isinstance(results, dict):
        render(folder, results, train_rows(num_steps=3) + eval_rows())
    else:
        with pytest.raises(ValueError, match="results.json: expected a JSON object"):
            render(folder, results)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(
        st.binary(max_size=40)
        | st.dictionaries(
            st.sampled_from(["kind", "stage", "step", "loss", "accuracy", "mfu", "grad_norm"]),
            VALUES | st.sampled_from(["train", "eval"]),
        ).map(lambda row: json.dumps(row).encode()),
        max_size=8,
    )
)
def test_any_lines_of_metrics_give_a_page(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("run")
    (folder / "results.json").write_text(json.dumps(make_results()))
    good = [json.dumps(row).encode() for row in train_rows(num_steps=3)]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(good + lines))
    Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "content", [b"", b'{"models": [', b"\xff\xfe\x00", b"\x00" * 99, DEEP.encode(), b"9" * 5000]
)
def test_torn_and_garbled_files_are_refused_or_skipped_and_counted(tmp_path, content):
    page = render(tmp_path, make_results(), train_rows(), lines=[])
    good = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + content + b"\n" + good)
    (tmp_path / "env.json").write_bytes(content)
    (tmp_path / "config.yaml").write_bytes(content)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ("1 unreadable lines of metrics.jsonl were skipped" in page.text) == bool(content)
    assert "env.json is missing or unreadable" in page.text
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match="results.json: expected a JSON object, got .*; run the"):
        write_report(tmp_path)


def test_hostile_names_are_escaped_in_the_page_and_on_the_console(tmp_path):
    results = _full_results()
    results |= {"name": HOSTILE, "label_names": [HOSTILE, "b"], "advice": [HOSTILE]}
    results["differing"]["texts"] = [{"text": HOSTILE, "label": HOSTILE, "teacher": HOSTILE}]
    for model in results["models"]:
        model["name"] = HOSTILE
    page = render(tmp_path, results, train_rows(HOSTILE))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = "\\x1b]0;owned\\x07\\x1b[2J<script>\\u202e\\x9b31m\\ud800\\x00"
    assert page.text.count(shown) > 5
    for text in (source, printable(HOSTILE), json_line({HOSTILE: [HOSTILE, "\u2028"]})):
        assert not set(text) & set("\x00\x07\x1b\x9b\u202e\u2028\ud800")
    assert "<script" not in source
    assert printable("tab\tline\n中文 é") == "tab\tline\n中文 é"
    assert json.loads(json_line({HOSTILE: "中\u2028"})) == {HOSTILE: "中\u2028"}
    with pytest.raises(ValueError):
        json_line([float("nan")])


def test_many_classes_are_cut_with_a_line_that_says_so(tmp_path):
    names = [f"class {i}" for i in range(10_000)]
    scores = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    rows = [{"name": name, **scores, "support": i} for i, name in enumerate(names)]
    results = make_results(models=[make_model("student", 0.5, 1.0, per_class=rows)])
    page = render(tmp_path, results)
    assert "100 classes with the most true cases; results.json holds all 10,000." in page.text
    assert "class 9999" in page.text and "class 9899" not in page.text
    mistakes = [
        {"true": 7, "predicted": 9999, "count": 30, "support": 40},
        {"true": 9999, "predicted": 7, "count": 10, "support": 40},
    ]
    model = make_model("student", 0.5, 1.0, confusion=None, mistakes=mistakes)
    page = render(tmp_path, make_results(models=[model], label_names=names))
    assert "class 7class 99993075.0 %" in page.text
    assert "The most frequent mistakes among 10000 classes; results.json has no matrix" in page.text
