"""The part of a report that tells what an update mends and breaks."""

from tinybert_jax.report.gate import gate_section

COUNTS = {"both": 90, "fixed": 2, "broken": 1, "neither": 7, "broken_bound": 0.05, "mcnemar_p": 1.0}
ROW = {"text": "<b>Where?", "label": "cards", "old": "cards", "new": "loans"}


def test_rows_that_are_wrong_now_are_shown():
    update = {"old": "hf", "dev": {"old": COUNTS, "new": COUNTS}, "reasons": [], "broken": [ROW]}
    page = gate_section({"update": {**update, "wrong": [ROW, ROW]}})
    assert "1 of the 1 old rows that broke." in page
    assert "2 of the 8 new rows that the new model has wrong." in page
    assert page.count("&lt;b&gt;Where?") == 3
    older = gate_section({"update": update})  # as results were before
    assert "new rows that the new model has wrong" not in older and "old rows that broke" in older
