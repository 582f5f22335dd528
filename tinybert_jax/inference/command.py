"""The commands on model folders: `evaluate`, `predict`, `ask`, `embed`, `search`, `translate`,
`compare`.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tinybert_jax.config import load as config_files
from tinybert_jax.data.errors import columns_named_by
from tinybert_jax.inference import translate
from tinybert_jax.report.console import json_line, printable


def add_to(commands) -> None:
    """Adds the commands to those of the parser; a command imports JAX only when it runs."""
    _add_evaluate(commands)
    _add_predict(commands)
    _add_ask(commands)
    _add_embed(commands)
    _add_search(commands)
    translate.add_to(commands)
    _add_compare(commands)


def _add_evaluate(commands) -> None:
    text = "score a Hugging Face classifier folder on labelled text"
    command = commands.add_parser("evaluate", help=text, description=text)
    command.add_argument("model", help="a model folder or hub id")
    _add_labelled_text(command)
    command.set_defaults(act=_evaluate)


def _add_predict(commands) -> None:
    text = "label text with a Hugging Face classifier folder; writes one JSON object per line"
    command = commands.add_parser("predict", help=text, description=text)
    command.add_argument("model", help="a model folder or hub id")
    command.add_argument("data", nargs="?", type=os.path.expanduser, help=".tsv, .csv or .jsonl")
    command.add_argument(
        "-t", "--sentence", action="append", help="a text to label, instead of a data file"
    )
    command.add_argument(
        "--text-pair",
        action="append",
        help="column of a second text; with -t that text itself, one for each",
    )
    command.add_argument(
        "-o",
        "--output",
        type=os.path.expanduser,
        help="write to this file; default: standard output",
    )
    _add_columns(command, has_pair=False)
    command.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN",
        help="copy this column of the file into the output; may be given several times",
    )
    command.add_argument(
        "--logits", action="store_true", help="also write the logits of a classifier, by label"
    )
    command.set_defaults(act=_predict)


def _add_ask(commands) -> None:
    text = "answer questions about a text file; writes one JSON object per question"
    command = commands.add_parser("ask", help=text, description=text)
    command.add_argument("model", help="a folder or hub id of a question-answering model")
    command.add_argument("text", type=os.path.expanduser, help="a file of plain text (UTF-8)")
    command.add_argument("-q", "--question", action="append", required=True, help="a question")
    command.add_argument("--max-length", type=int, help="tokens of a window; default: all")
    command.set_defaults(act=_ask)


def _add_embed(commands) -> None:
    text = "make a vector of each text of a file"
    command = commands.add_parser("embed", help=text, description=text)
    command.add_argument("model", help="a folder or hub id of a model of sentence vectors")
    command.add_argument("data", type=os.path.expanduser, help=".tsv, .csv, .jsonl or .txt")
    command.add_argument(
        "-o",
        "--output",
        type=os.path.expanduser,
        help="a .npy file to write, fp32 [texts, dim]; default: one JSON object per line to "
        "standard output",
    )
    _add_vectors(command)
    command.set_defaults(act=_embed)


def _add_search(commands) -> None:
    text = "find the texts of a file that are closest in meaning to a question"
    command = commands.add_parser("search", help=text, description=text)
    command.add_argument("model", help="a folder or hub id of a model of sentence vectors")
    command.add_argument("data", type=os.path.expanduser, help=".tsv, .csv, .jsonl or .txt")
    command.add_argument("-q", "--question", action="append", required=True, help="a question")
    command.add_argument("-k", "--top", type=int, default=5, help="texts to give; default: 5")
    command.add_argument("--label", help="column to give with each text, as its answer or intent")
    command.add_argument(
        "--index",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="keep the texts' vectors there, so that the next search embeds the question alone; "
        "beyond 100,000 texts an approximate index (extra index)",
    )
    command.add_argument(
        "--rerank",
        metavar="MODEL",
        help="a regression model of pairs, which reads the question with each of the 50 closest "
        "texts and orders them",
    )
    _add_vectors(command)
    command.set_defaults(act=_search)


def _add_vectors(command) -> None:
    command.add_argument(
        "--text", help="column of the text; default: text, or the one that may be it"
    )
    command.add_argument("--split", help="split of a datasets folder or hub data set")
    command.add_argument(
        "--max-length", type=int, help="tokens of a text; default: as the model's folder says"
    )
    command.add_argument(
        "--width", type=int, help="first columns of the vectors, of a model with task.widths"
    )


def _add_compare(commands) -> None:
    text = "compare two model folders on labelled text: what the new one mends and breaks"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument("old", help="a model folder or hub id")
    command.add_argument("new", help="another one for the same task")
    _add_labelled_text(command)
    command.add_argument("--by", metavar="COLUMN", help="group the examples by this column")
    add_max_regressions(command)
    command.add_argument(
        "-o", "--output", type=os.path.expanduser, help="also write a .json or .html file"
    )
    command.set_defaults(act=_compare)


def add_max_regressions(command) -> None:
    command.add_argument(
        "--max-regressions",
        type=_share,
        metavar="SHARE",
        help="status 3 where more may be broken, as 0.5%% (the upper bound of 95 %% confidence)",
    )


def _add_labelled_text(command) -> None:
    """The file of labelled text and how it is read; after the models, which come first."""
    command.add_argument(
        "data",
        help=".tsv, .csv or .jsonl, a saved datasets folder, hub:…; for a translation also lines, "
        "with task.dev_target=FILE",
    )
    command.add_argument("--label", help="column of the labels; default: label")
    _add_columns(command)
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="task.key=value",
        help="how the file is read, as in a config: task.separator, task.scheme, task.words, …",
    )


def _share(text: str) -> float:
    """A share such as 0.5% or 0.005."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a share between 0 and 1, as 0.5% or 0.005, got {text!r}"
        )
    return value


def _add_columns(command, *, has_pair: bool = True) -> None:
    command.add_argument("--text", help="column of the text; default: that trained on, or text")
    if has_pair:
        command.add_argument("--text-pair", help="column of a second text")
    command.add_argument("--split", help="split of a datasets folder or hub data set")
    command.add_argument(
        "--max-length",
        type=int,
        help="tokens per row; default: the model's max_position_embeddings",
    )


def _evaluate(arguments, command: str) -> int:
    from tinybert_jax.inference import predict

    settings = _reading(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # nothing but JSON on standard output
        scores = predict.evaluate_file(
            arguments.model,
            arguments.data,
            split=arguments.split,
            max_length=arguments.max_length,
            settings=settings,
        )
    print(json.dumps(scores, indent=2, allow_nan=False))
    return 0


def _compare(arguments, command: str) -> int:
    from tinybert_jax.inference import compare
    from tinybert_jax.report import comparison

    output = Path(arguments.output) if arguments.output else None
    if output and (output.suffix not in (".json", ".html") or not output.parent.is_dir()):
        raise ValueError(
            f"--output: expected a .json or .html file in a folder that exists, got {output}; "
            "correct it"
        )
    with contextlib.redirect_stdout(sys.stderr):
        found = compare.compare(
            arguments.old,
            arguments.new,
            arguments.data,
            split=arguments.split,
            max_length=arguments.max_length,
            settings=_reading(arguments),
            by=arguments.by,
            max_regressions=arguments.max_regressions,
        )
    if output:
        is_page = output.suffix == ".html"
        text = comparison.page(found) if is_page else json.dumps(found, indent=2) + "\n"
        output.write_text(printable(text), encoding="utf-8")
    for line in comparison.lines(found):
        print(printable(line))
    return 0 if found.get("is_allowed", True) else 3


def _reading(arguments) -> dict[str, Any]:
    """The settings of how a file is read, from options and `task.key=value`."""
    given = config_files.read_overrides(arguments.overrides)
    settings = given.pop("task", {})
    if given or not isinstance(settings, dict):
        raise ValueError(
            f"expected settings of the task, such as task.scheme=iob1, got {arguments.overrides}; "
            "put task. before the key"
        )
    columns = {name: getattr(arguments, name) for name in ("text", "text_pair", "label")}
    columns = {name: column for name, column in columns.items() if column is not None}
    twice = sorted(set(columns) & set(settings))
    if twice:
        raise ValueError(
            f"expected each column once, got {twice} as an option and as a task setting; remove one"
        )
    return {**columns, **settings}


def _predict(arguments, command: str) -> int:
    from tinybert_jax.inference import predict

    if bool(arguments.data) == bool(arguments.sentence):
        got = "both" if arguments.data else "neither"
        raise ValueError(
            f"predict: expected a data file or --sentence, got {got}; give exactly one"
        )
    pairs = arguments.text_pair or []
    if arguments.data and len(pairs) > 1:
        raise ValueError(f"--text-pair: expected one column of {arguments.data}, got {pairs}")
    output = Path(arguments.output) if arguments.output else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(
            f"--output: expected the name of a file in a folder that exists, got {output}; "
            "correct it, or create the folder"
        )
    if output and arguments.data and output.exists() and output.samefile(arguments.data):
        raise ValueError(
            f"--output: expected another file than the data, got {output} for both; choose "
            "another name"
        )
    if arguments.logits:
        predict.check_has_logits(arguments.model)
    # Nothing but JSON on standard output.
    with contextlib.redirect_stdout(sys.stderr), columns_named_by("--text or --text-pair"):
        rows = predict.predict(
            arguments.model,
            arguments.data or arguments.sentence,
            text=arguments.text,
            text_pair=pairs[0] if arguments.data and pairs else None,
            pairs=pairs if arguments.sentence and pairs else None,
            split=arguments.split,
            max_length=arguments.max_length,
            keep=arguments.keep,
            has_logits=arguments.logits,
            say=_say,
        )
    lines = "".join(json_line(row) + "\n" for row in rows)
    if output:
        output.write_text(lines, encoding="utf-8")
        print(printable(f"{output}: {len(rows):,} rows"), file=sys.stderr)
    else:
        print(lines, end="")
    return 0


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _ask(arguments, command: str) -> int:
    from tinybert_jax.data.tables import read_utf8
    from tinybert_jax.inference import predict

    with contextlib.redirect_stdout(sys.stderr):  # nothing but JSON on standard output
        text = read_utf8(arguments.text)
        answers = predict.ask(
            arguments.model, text, arguments.question, max_length=arguments.max_length
        )
    for answer in answers:
        print(json_line(answer))
    return 0


def _embed(arguments, command: str) -> int:
    import numpy as np

    from tinybert_jax.inference import predict, search

    output = Path(arguments.output) if arguments.output else None
    if output and (output.suffix != ".npy" or not output.parent.is_dir()):
        raise ValueError(
            f"--output: expected a .npy file in a folder that exists, got {output}; correct it"
        )
    # Nothing but JSON on standard output.
    with contextlib.redirect_stdout(sys.stderr), columns_named_by("--text"):
        texts = search.read_texts(arguments.data, arguments.text, split=arguments.split, say=_say)
        options = {"max_length": arguments.max_length, "width": arguments.width}
        vectors = predict.embed(arguments.model, texts.texts, **options)
    if output:
        np.save(output, vectors)
        print(f"{output}: {len(vectors):,} vectors of {vectors.shape[1]}", file=sys.stderr)
        return 0
    for row, text, vector in zip(texts.rows, texts.texts, vectors, strict=True):
        print(json_line({"row": row, "text": text, "vector": vector.tolist()}))
    return 0


def _search(arguments, command: str) -> int:
    from tinybert_jax.inference import search

    names = ("top", "text", "label", "split", "max_length", "width", "index", "rerank")
    with contextlib.redirect_stdout(sys.stderr), columns_named_by("--text or --label"):
        found = search.search(
            arguments.model,
            arguments.data,
            arguments.question,
            **{name: getattr(arguments, name) for name in names},
            say=_say,
        )
    for answer in found:
        print(json_line(answer))
    return 0
