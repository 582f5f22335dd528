"""The model card (README.md) of an exported folder, from `results.json` and its `config.json`.

Its metadata are those that the Hugging Face hub reads. Names from data and configs may hold any
characters: they are escaped, or quoted by YAML.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from tinybert_jax import __version__
from tinybert_jax.report.console import printable
from tinybert_jax.report.gate import COLUMNS, sides_of
from tinybert_jax.report.score_table import choice_note
from tinybert_jax.report.tables import format_si, interval_of, metric_name, show_score

# The end of an architecture -> the task of the hub; others give features.
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "EncoderDecoderModel": "translation",
}
_DEFAULT = "feature-extraction"
# Task -> (a call in Python, a command or a call of this package). LENGTH: see `_longest`.
_CALLS = {
    "text-classification": (
        'model("A text.", truncation=True, max_length=LENGTH)',
        'tinybert predict FOLDER -t "A text."',
    ),
    "token-classification": ('model("A text.")', 'tinybert predict FOLDER -t "A text."'),
    "question-answering": (
        'inputs = tokenizer("Who?", "A text.", truncation="only_second", max_length=LENGTH, '
        'return_tensors="pt")\n'
        "found = model(**inputs)\n"
        "start, end = found.start_logits.argmax(), found.end_logits.argmax() + 1\n"
        'answer = tokenizer.decode(inputs["input_ids"][0, start:end])',
        'tinybert ask FOLDER manual.txt -q "Who?"',
    ),
    "sentence-similarity": (
        'vectors = model.encode(["A text."])',
        "tinybert embed FOLDER texts.txt -o vectors.npy",
    ),
    "fill-mask": ('model("A [MASK].")', 'TinyBertForMaskedLM.from_pretrained("FOLDER")'),
    "translation": (
        'inputs = tokenizer("A text.", truncation=True, max_length=LENGTH, return_tensors="pt", '
        "return_token_type_ids=False)\n"
        "ids = model.generate(**inputs, num_beams=4)\n"
        "text = tokenizer.batch_decode(ids, skip_special_tokens=True)",
        'tinybert translate FOLDER -t "A text."',
    ),
    _DEFAULT: ('model("A text.")', 'TinyBertModel.from_pretrained("FOLDER")'),
}
# Task without a pipeline in transformers -> the class that loads a folder.
_CLASSES = {
    "question-answering": "AutoModelForQuestionAnswering",
    "translation": "EncoderDecoderModel",
}
_CUT = "Both calls above read up to {} tokens of a text and cut the rest."
# Task -> what both calls do with a long text; for other tasks the two calls differ.
_LONG = {
    "text-classification": _CUT,
    "sentence-similarity": _CUT,
    "translation": _CUT,
    "question-answering": (
        "The first call above cuts question and text at {0} tokens, the second reads a longer text "
        "in windows of {0}."
    ),
}
_SPLIT = "Texts of more than {} tokens do not fit: split them."
_FOLDER = "# FOLDER: this folder, or its name on the hub as owner/name\n"
_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_ROLES = {
    "teacher": "its teacher",
    "baseline": "the same model without a teacher",
    "linear": "TF-IDF with logistic regression",
}
_NO_LICENCE = "None is named: add `license` to the lines at the top before you publish the model."
_NUM_LABELS = 100  # of them are listed
_WITHOUT_TEACHER = ("pretrain", "finetune", "baseline", "update")
# Stage -> what the model began with, in place of a teacher.
_BEGAN = dict.fromkeys(("pretrain", "finetune"), "model that it started from")
_BEGAN["update"] = "earlier model"


class Origin(NamedTuple):
    """What a card tells beyond the results of the run."""

    stage: str  # that trained the exported model
    member: str  # the exported student, "" where there is one
    data: str  # the name of the task's data, "" without a task or a name
    teacher: str  # a hub id, or the name of a folder; "" without a teacher
    teacher_card: Mapping[str, Any]  # its license and language, where it has a card
    is_hub_teacher: bool
    is_embedder: bool
    target_tokenizer: str = ""  # subfolder with that of a translation's targets, if they have one


def model_card(results: Mapping[str, Any], config: Mapping[str, Any], origin: Origin) -> str:
    """The text of README.md, for the model with this `config.json`."""
    model, others = _models(results, origin)
    title = " ".join(part for part in (str(results["name"]), origin.member) if part)
    parts = [
        f"---\n{_metadata(results, config, origin, model, title)}---",
        f"# {_text(title)}",
        _summary(results, config, origin, model),
        _scores(results, model, others) if model else _heldout(results),
        _change(results),
        _use(results, config, origin),
        _training(results, origin),
        _limits(results, config, origin),
        _licence(origin),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_metadata(text: str) -> dict[str, Any]:
    """The license and the language that a model card names; {} where it names none."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    lines = found[1] if found else ""
    named = re.findall(r"^(license|language): *['\"]?([A-Za-z0-9.+_-]{1,40})['\"]? *$", lines, re.M)
    listed = re.findall(r"^language: *\r?\n- *['\"]?([A-Za-z-]{2,12})['\"]? *$", lines, re.M)
    return {**({"language": listed[0]} if listed else {}), **dict(named)}


def _models(
    results: Mapping[str, Any], origin: Origin
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """(the entry of the exported model, those that it is compared with)."""
    found = None
    for model in results["models"]:
        is_member = not origin.member or model["name"] == origin.member
        if model.get("stage") == origin.stage and is_member:
            found = found or model
    others = [
        model
        for model in results["models"]
        if model is not found
        and (model["role"] in ("teacher", "linear") or found and model["name"] == found["name"])
    ]
    return found, others


def _metadata(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    origin: Origin,
    model: dict[str, Any] | None,
    title: str,
) -> str:
    task = _task(config, origin)
    metadata = {
        **origin.teacher_card,
        "library_name": "sentence-transformers" if origin.is_embedder else "transformers",
        "pipeline_tag": task,
        "tags": ["tinybert_jax", str(config["model_type"])]
        + ([] if origin.stage in _WITHOUT_TEACHER else ["distillation"]),
    }
    if origin.is_hub_teacher:
        metadata["base_model"] = origin.teacher
    if model:
        slug = re.sub(r"[^A-Za-z0-9._/-]+", "-", origin.data).strip("-") or "data"
        scores = [
            {
                "type": _METRICS.get(name, name),
                "name": metric_name(name, results),
                "value": round(float(value), 4),
            }
            for name, value in model["metrics"].items()
            if math.isfinite(value)
        ]
        result = {
            "task": {"type": task},
            "dataset": {"type": slug, "name": origin.data or slug, "split": "dev"},
            "metrics": scores,
        }
        metadata["model-index"] = [{"name": title, "results": [result]}]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)


def _task(config: Mapping[str, Any], origin: Origin) -> str:
    """The hub's name of what the model does."""
    if origin.is_embedder:
        return "sentence-similarity"
    architecture = config["architectures"][0]
    return next((task for name, task in _TASKS.items() if architecture.endswith(name)), _DEFAULT)


def _summary(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    origin: Origin,
    model: dict[str, Any] | None,
) -> str:
    depth = config.get("num_hidden_layers", config.get("n_layers"))
    kind = "Transformer encoder"
    if "decoder" in config:
        kind = "Transformer encoder-decoder"
        depth = " + ".join(str(side["num_hidden_layers"]) for side in _sides(config))
        config = {**_sides(config)[0], **config}
    width = config.get("hidden_size", config.get("dim"))
    size = f"{depth} layers, {width} wide"
    if model:
        counts = [float(model[f"num_{own}parameters"]) for own in ("", "encoder_")]
        size += f", {format_si(counts[0])} parameters, {format_si(counts[1])} without embeddings"
    made = {
        "finetune": "fine-tuned from",
        "pretrain": "trained on text; it began as",
        "update": "updated from",
    }
    if origin.stage == "baseline":
        begun = "trained without a teacher"
    elif origin.teacher:
        begun = f"{made.get(origin.stage, 'distilled from')} {_text(origin.teacher)}"
    elif origin.stage in made:
        begun = "trained from random weights"
    else:
        begun = "distilled from a teacher that was trained in the same run"
    train = str(results.get("data", {}).get("train", ""))
    data = train if train.rpartition(".")[0] == origin.data else origin.data
    data = f" with the text of {_text(data)}" if data else ""
    size = f"{config['model_type']}, {size}"
    return f"A {kind} ({size}), {begun}{data}, by tinybert_jax {__version__}."


def _scores(results: Mapping[str, Any], model: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The table of the exported model and what it is compared with."""
    names = list(model["metrics"])
    lines = [
        "## Scores and costs",
        f"On {results['dev_examples']:,} dev rows, with 95 % intervals over the rows. "
        + _dev_rows(results)
        + _chosen(results, model),
        f"| model | {' | '.join(_text(metric_name(name, results)) for name in names)} | "
        "encoder parameters, without embeddings | on disk | latency |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for own in [model, *others]:
        called = "**this model**" if own is model else _ROLES.get(own["role"], str(own["role"]))
        cells = [called]
        for name in names:
            value, bounds = own["metrics"].get(name), interval_of(own, name)
            show = functools.partial(show_score, name, digits=4)
            shown = "" if value is None else show(value)
            cells.append(shown + (f" [{show(bounds[0])}, {show(bounds[1])}]" if bounds else ""))
        size, latency = own.get("num_encoder_parameters"), own.get("latency_ms")
        cells.append(format_si(float(size)) if size else "")
        disk = own.get("bytes_on_disk")
        cells.append(format_si(float(disk), "B") if disk else "")
        cells.append(f"{latency['median']:.1f} ms" if latency else "")
        lines.append(f"| {' | '.join(cells)} |")
    if latency := model.get("latency_ms"):
        place = f"{latency['batch']} × {latency['seq_len']} tokens on {latency['device']}"
        lines += [
            "",
            f"Latency: the median time of {_text(place)}, measured in turn with the others.",
        ]
    head, told, *table = lines
    return "\n\n".join([head, told, "\n".join(table)])


def _change(results: Mapping[str, Any]) -> str:
    """The table of what an update mends and breaks."""
    sides = sides_of(results)
    if not sides:
        return ""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(side.cells for side in sides)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"## What changed\n\n{table}\n\nRight before: by the model that it was updated from. The "
        "bound holds with 95 % confidence."
    )


def _dev_rows(results: Mapping[str, Any]) -> str:
    """Where the dev rows come from; empty in results of an older version."""
    data = results.get("data", {})
    if share := data.get("dev_share"):
        files = " and ".join(_text(str(data[name])) for name in ("train", "old") if name in data)
        earlier = ", but the earlier model may have been trained on some" if "old" in data else ""
        return (
            f"These are about {100 * share:.3g} % of the rows of {files}, set apart by a hash of "
            f"their text; no stage of this run trains on them{earlier}. "
        )
    if dev := data.get("dev"):
        split = f", split {_text(str(data['dev_split']))}" if "dev_split" in data else ""
        return f"These are rows of their own, of {_text(str(dev))}{split}. "
    return "They are of the built-in text. " if data.get("builtin") else ""


def _chosen(results: Mapping[str, Any], model: dict[str, Any]) -> str:
    told, count = "", len(model.get("by_seed", ()))
    if count > 1 and model["role"] != "teacher":
        told = f"The score is the mean of {count} seeds; the folder holds the best. "
    return told + choice_note(dict(results))


def _heldout(results: Mapping[str, Any]) -> str:
    found = results.get("heldout", {})
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in found.items())
    return f"## Scores\n\nOn held-out text: {values}." if values else ""


def _use(results: Mapping[str, Any], config: Mapping[str, Any], origin: Origin) -> str:
    task = _task(config, origin)
    theirs, ours = _CALLS.get(task, _CALLS[_DEFAULT])
    if origin.is_embedder:
        code = (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("FOLDER")\n{theirs}'
        )
    elif task in _CLASSES:
        own = _CLASSES[task]
        code = (
            f"from transformers import AutoTokenizer, {own}\n\n"
            f'model = {own}.from_pretrained("FOLDER")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n{theirs}'
        )
        if origin.target_tokenizer:
            own = f'AutoTokenizer.from_pretrained("FOLDER", subfolder="{origin.target_tokenizer}")'
            code = code.replace("tokenizer.batch_decode", f"{own}.batch_decode")
    else:
        code = (
            "from transformers import pipeline\n\n"
            f'model = pipeline("{task}", model="FOLDER")\n{theirs}'
        )
    code = code.replace("LENGTH", str(_longest(config)))
    return (
        f"## Use\n\n```python\n{_FOLDER}{code}\n```\n\nWith tinybert_jax:\n\n"
        f"```\n{_FOLDER}{ours}\n```"
    )


def _training(results: Mapping[str, Any], origin: Origin) -> str:
    return (
        f"## How it was made\n\nStages of the run: {', '.join(results['seconds'])}. Exported "
        f"after the stage `{origin.stage}`. `lineage.json` holds hashes of the data, the config "
        "and the models that it began with."
    )


def _limits(results: Mapping[str, Any], config: Mapping[str, Any], origin: Origin) -> str:
    labels = results.get("label_names") or []
    lines = ["## Intended use and limits"]
    if labels:
        shown = ", ".join(_text(str(label)) for label in labels[:_NUM_LABELS])
        more = f" and {len(labels) - _NUM_LABELS} more" if len(labels) > _NUM_LABELS else ""
        lines.append(f"Labels: {shown}{more}. The model knows no others.")
    lines.append(
        "The scores hold for texts like those of the dev rows. Errors and biases of "
        f"{_began(origin)}the training data carry over."
    )
    task, trained = _task(config, origin), _trained_length(results, origin)
    rows = "in windows of" if task == "question-answering" else "on texts of at most"
    told = f"The model was trained {rows} {trained} tokens. " if trained else ""
    lines.append(told + _LONG.get(task, _SPLIT).format(_longest(config)))
    return "\n\n".join(lines)


def _began(origin: Origin) -> str:
    is_first = origin.stage == "baseline" or (origin.stage in _BEGAN and not origin.teacher)
    return "" if is_first else f"the {_BEGAN.get(origin.stage, 'teacher')} and of "


def _trained_length(results: Mapping[str, Any], origin: Origin) -> int | None:
    """Tokens of the longest row of the stage; None in results of an older version."""
    return results.get("max_length", {}).get(origin.stage)


def _longest(config: Mapping[str, Any]) -> int:
    """Tokens of a text that the commands of this package read: the positions of the encoder."""
    return _sides(config)[0]["max_position_embeddings"]


def _licence(origin: Origin) -> str:
    name = origin.teacher_card.get("license")
    told = (
        f"As that of the {_BEGAN.get(origin.stage, 'teacher')}, {_text(name)}; check that it fits "
        "your data."
        if name
        else _NO_LICENCE
    )
    return f"## Licence\n\n{told}"


def _sides(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sizes of the encoder and the decoder, or of the only encoder."""
    return [config["encoder"], config["decoder"]] if "decoder" in config else [config]


def _text(value: str) -> str:
    """A name on one line, without the characters that Markdown or HTML would read."""
    plain = " ".join(printable(value).split())
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", plain)
