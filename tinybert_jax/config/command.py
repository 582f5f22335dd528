"""The command `schema`."""

import json

_TOPS = ("run", "prepare")


def add_to(commands) -> None:
    """Adds the command to those of the parser."""
    text = "print the JSON schema of a config, with which editors complete and check YAML files"
    command = commands.add_parser("schema", help=text, description=text)
    command.add_argument(
        "top",
        nargs="?",
        choices=_TOPS,
        default=_TOPS[0],
        help="config of a run, or of data prepare; default: run",
    )
    command.set_defaults(act=_schema)


def _schema(arguments, command: str) -> int:
    from tinybert_jax.config.schema import json_schema

    print(json.dumps(json_schema(arguments.top), indent=1, ensure_ascii=False))
    return 0
