"""The command `report`."""

import os
from pathlib import Path

from tinybert_jax.report.console import printable

_DEFAULT = "comparison.html"


def add_to(commands) -> None:
    """Adds the command to those of the parser."""
    text = "write the report of a finished run again, or compare several runs on one page"
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=os.path.expanduser,
        help="the folder of a finished run; of several, the first is what others are compared with",
    )
    command.add_argument(
        "-o",
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help=f"the .html file to write; default: report.html of the run, of several {_DEFAULT}",
    )
    command.set_defaults(act=_report)


def _report(arguments, command: str) -> int:
    from tinybert_jax.report import page, run_comparison

    runs, output = [Path(run) for run in arguments.runs], arguments.output
    if output is not None:
        file = Path(output)
        if file.suffix != ".html" or file.is_dir() or not file.parent.is_dir():
            raise ValueError(
                f"--output: expected a .html file in a folder that exists, got {file}; correct it"
            )
    if len(runs) == 1:
        print(printable(str(page.write_report(runs[0], output))))
        return 0
    text = run_comparison.comparison_page(runs)
    file = Path(output or _DEFAULT)
    file.write_text(printable(text), encoding="utf-8")
    print(printable(str(file)))
    return 0
