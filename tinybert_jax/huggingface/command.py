"""The commands `convert` and `push`."""

import os

from tinybert_jax.report.console import printable


def add_to(commands) -> None:
    """Adds the commands to those of the parser."""
    _add_convert(commands)
    _add_push(commands)


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


def _add_push(commands) -> None:
    text = "send a model folder to the Hugging Face hub, as one commit"
    command = commands.add_parser("push", help=text, description=text)
    command.add_argument("folder", type=os.path.expanduser, help="a model folder, as runs/mail/hf")
    command.add_argument("name", metavar="owner/name", help="the repository; made where missing")
    command.add_argument("--public", action="store_true", help="everybody may read it")
    command.add_argument("-m", "--message", default="Update the model", help="of the commit")
    command.add_argument(
        "--dry-run", action="store_true", help="print what would be sent and stop; asks no network"
    )
    command.set_defaults(act=_push)


def _convert(arguments, command: str) -> int:
    from tinybert_jax.huggingface import rewrite

    print(printable(str(rewrite.convert(arguments.source, arguments.target))))
    return 0


def _push(arguments, command: str) -> int:
    from tinybert_jax.huggingface import push

    plan = push.make_plan(arguments.folder, arguments.name, is_public=arguments.public)
    print(printable(plan.describe()))
    if not arguments.dry_run:
        print(printable(push.push(plan, arguments.message)))
    return 0
