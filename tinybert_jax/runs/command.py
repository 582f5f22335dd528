"""The commands on run folders: `ckpt` and `doctor`. A command imports JAX only when it runs."""

import os

from tinybert_jax.config.stages import STAGE_NAMES
from tinybert_jax.report.console import printable

_path = os.path.expanduser  # shells do not expand ~ in `--output=~/file`
_RUN_DIR: dict[str, str] = dict.fromkeys(("prune", "export"), "the folder of a run")
_RUN_DIR |= dict.fromkeys(("ls", "verify"), "the folder of a run, or the URL of its run_store")
_RUN_DIR |= {"fetch": "the run_store of a run"}


def add_to(commands) -> None:
    """Adds the commands to those of the parser."""
    _add_ckpt(commands)
    _add_doctor(commands)


def _add_ckpt(commands) -> None:
    text = "list, verify, remove and export the checkpoints of a run folder"
    actions = commands.add_parser("ckpt", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="action"
    )
    texts = {
        "ls": "print the place, size and time of each checkpoint",
        "verify": "compare the SHA-256 of every file; status 3 where one differs",
        "prune": "remove all but the newest states of each stage and those of the best scores",
        "export": "write the trained arrays of a state to a safetensors file",
        "fetch": "write the newest complete copy in a run_store to a new folder",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("run_dir", type=_path, help=_RUN_DIR[name])
        action.set_defaults(act=_ckpt)
        if name == "prune":
            action.add_argument("--keep", type=int, default=1, help="default: 1")
        if name == "fetch":
            action.add_argument("-o", "--output", type=_path, required=True, help="a new folder")
        if name == "export":
            action.add_argument("stage", choices=STAGE_NAMES, help="a stage of the run")
            action.add_argument("--step", type=int, help="default: the newest")
            action.add_argument("-o", "--output", type=_path, required=True, help="a new file")


def _add_doctor(commands) -> None:
    text = "print what this machine is and what would make runs faster, also of a run folder"
    command = commands.add_parser("doctor", help=text, description=text)
    command.add_argument("run_dir", nargs="?", type=_path, help="the folder of a run")
    command.add_argument("--markdown", action="store_true", help="a table for a report of a bug")
    command.set_defaults(act=_doctor)


def _ckpt(arguments, command: str) -> int:
    from tinybert_jax.runs import saved_states

    options = {key: v for key, v in vars(arguments).items() if key not in ("command", "act")}
    return saved_states.act(**options)


def _doctor(arguments, command: str) -> int:
    from tinybert_jax.runs import doctor

    report = doctor.examine(arguments.run_dir)
    print(printable(doctor.describe(report, is_markdown=arguments.markdown)))
    return 0
