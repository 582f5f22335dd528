"""The command `convert`."""

import os

from tinybert_jax.report.console import printable


def add_to(commands) -> None:
    """Adds the command to those of the parser."""
    _add_convert(commands)


def _add_convert(commands) -> None:
    text = (
        "rewrite a model folder with old weight names, shards or a missing prefix in the current "
        "format, and compare every weight"
    )
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("source", help="a model folder or hub id")
    command.add_argument(
        "target", type=os.path.expanduser, help="the folder to write; it must not exist yet"
    )
    command.set_defaults(act=_convert)


def _convert(arguments, command: str) -> int:
    from tinybert_jax.huggingface import rewrite

    print(printable(str(rewrite.convert(arguments.source, arguments.target))))
    return 0
