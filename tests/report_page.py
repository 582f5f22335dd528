"""Results of made-up runs, and the page that the report makes of them, parsed."""

import json
import math
from html.parser import HTMLParser

from tinybert_jax.report.page import write_report

VOID = {"meta", "link", "br", "wbr"}
SELF_CLOSED = {"path", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """The text and the tags of a page; fails on tags that are not closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSED
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")

    def count(self, css_class):
        """The number of tags with a CSS class."""
        return sum(css_class in (a.get("class") or "").split() for _, a in self.tags)


def make_model(role, accuracy, scale, **more):
    return {
        "role": role,
        "name": f"{role}-model",
        "num_parameters": 22_713_986,
        "num_encoder_parameters": int(10_646_784 / scale),
        "flops_per_token": 21e6 / scale,
        "bytes_on_disk": 90_856_704,
        "latency_ms": {"batch": 1, "seq_len": 32, "median": 12.3 / math.sqrt(scale)},
        "metrics": {"accuracy": accuracy, "f1": accuracy - 0.01},
        "confusion": [[380, 48], [37, 407]],
        **more,
    }


def make_results(**more):
    return {
        "name": "quickstart",
        "metric": "accuracy",
        "dev_examples": 872,
        "label_names": ["negative", "positive"],
        "models": [
            make_model("teacher", 0.905, 1.0),
            make_model("student", 0.885, 8.0),
            make_model("baseline", 0.861, 8.0),
        ],
        "share_kept": 0.885 / 0.905,
        "seconds": {"distill": 100.2, "finetune": 50.1},
        "commands": ["tinybert run configs/quickstart.yaml"],
        **more,
    }


def train_rows(stage="distill", num_steps=40):
    return [
        {
            "kind": "train",
            "stage": stage,
            "step": step,
            "time": 0.1 * step,
            "loss": 3.0 / step + 0.2,
            "loss/attention": 2.0 / step + 0.1,
            "loss/hidden": 1.0 / step + 0.1,
            "learning_rate": 5e-5 * step / num_steps,
            "grad_norm": 1.0 + 1.0 / step,
            "tokens_per_second": 12_000.0,
            "padding_share": 0.125,
            "mfu": 0.31,
        }
        for step in range(1, num_steps + 1)
    ]


def eval_rows(stage="distill"):
    return [
        {"kind": "eval", "stage": stage, "step": step, "accuracy": accuracy, "loss": 0.5}
        for step, accuracy in ((10, 0.7), (20, 0.88), (30, 0.86))
    ]


def render(run_dir, results, rows=(), lines=()):
    """The parsed report of a run folder with these results and log lines."""
    (run_dir / "results.json").write_text(json.dumps(results))
    if rows or lines:
        text = "\n".join([*map(json.dumps, rows), *lines])
        (run_dir / "metrics.jsonl").write_text(text)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))
