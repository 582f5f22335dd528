"""`tinybert data`: token stores and vocabularies. A command imports late what it needs."""

import os
from collections.abc import Callable
from typing import Any

from tinybert_jax.config import load as config_files
from tinybert_jax.config.data import PrepareConfig
from tinybert_jax.performance import host
from tinybert_jax.report.console import printable

_SOURCES = "files, folders, globs, saved datasets folders or hub:… ids, as for `data prepare`"


def add_to(commands: Any, add_config: Callable[[Any, str], None]) -> None:
    """Adds `data` to the commands of the parser; `add_config(command, example)`: its config."""
    text = "write and inspect token stores; train and extend vocabularies"
    actions = commands.add_parser("data", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="action"
    )
    text = "tokenise text files into a token store; repeat the command to resume an interrupted run"
    action = actions.add_parser("prepare", help=text, description=text)
    add_config(action, "configs/data/documents.yaml")
    action.set_defaults(act=_prepare)

    text = "print counts, lengths and decoded rows of a token store"
    action = actions.add_parser("inspect", help=text, description=text)
    action.add_argument("store", help="a folder that `tinybert data prepare` wrote")
    action.add_argument("-n", "--rows", type=int, default=3, help="rows to decode; default: 3")
    action.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    action.set_defaults(act=_inspect)

    text = "train a WordPiece vocabulary and write its tokenizer folder"
    action = actions.add_parser("vocab", help=text, description=text)
    action.add_argument("sources", nargs="+", help=_SOURCES)
    action.add_argument(
        "-o", "--output", type=os.path.expanduser, required=True, help="the folder to write"
    )
    action.add_argument("--size", type=int, default=30522, help="number of pieces; default: 30522")
    action.add_argument("--cased", action="store_true", help="keep capitals and accents")
    action.add_argument("--text", default="text", help="column of the text; default: text")
    action.add_argument("--split", help="split of a datasets folder or hub data set")
    action.add_argument(
        "--max-length", type=int, default=512, help="max_length of the tokenizer; default: 512"
    )
    action.set_defaults(act=_vocab)

    text = "add a piece to a model for each common word of new text that its tokenizer splits"
    action = actions.add_parser("extend", help=text, description=text)
    action.add_argument("model", help="a model folder or hub id; it is not changed")
    action.add_argument("sources", nargs="+", help=_SOURCES)
    action.add_argument(
        "-o", "--output", type=os.path.expanduser, required=True, help="the model folder to write"
    )
    action.add_argument("--words", type=int, default=1000, help="most words to add; default: 1000")
    action.add_argument(
        "--min-count", type=int, default=5, help="least count of a word in the text; default: 5"
    )
    action.add_argument("--text", default="text", help="column of the text; default: text")
    action.add_argument("--split", help="split of a datasets folder or hub data set")
    action.set_defaults(act=_extend)


def _prepare(arguments, command: str) -> int:
    settings = config_files.load_as(PrepareConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config_files.dump(settings), end="")
        return 0
    from tinybert_jax.huggingface.hub import load_tokenizer
    from tinybert_jax.tokens import inspect, prepare

    tokenizer = load_tokenizer(settings.tokenizer)
    folder = prepare.prepare(settings, tokenizer, host.make_progress_printer(seconds=5.0))
    print(printable(inspect.counts(folder)))
    return 0


def _inspect(arguments, command: str) -> int:
    from tinybert_jax.tokens import inspect

    shown = inspect.describe(arguments.store, num_rows=arguments.rows, verify=arguments.verify)
    print(printable(shown))
    return 0


def _extend(arguments, command: str) -> int:
    from tinybert_jax.data.wordpiece import iter_texts
    from tinybert_jax.huggingface import rewrite

    bad: list = []
    words = rewrite.extend_vocabulary(
        arguments.model,
        iter_texts(arguments.sources, text=arguments.text, split=arguments.split, bad=bad),
        arguments.output,
        num_words=arguments.words,
        min_count=arguments.min_count,
    )
    shown = ", ".join(words[:8]) + (" …" if len(words) > 8 else "")
    skipped = f"; {len(bad)} records could not be read" if bad else ""
    print(printable(f"{arguments.output}: {len(words):,} new words, {shown}{skipped}"))
    return 0


def _vocab(arguments, command: str) -> int:
    from tinybert_jax.data.wordpiece import write_vocab

    written = write_vocab(
        arguments.sources,
        arguments.output,
        vocab_size=arguments.size,
        lowercase=not arguments.cased,
        text=arguments.text,
        split=arguments.split,
        max_length=arguments.max_length,
    )
    print(printable(written))
    return 0
