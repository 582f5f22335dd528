"""The command `translate`: text with an encoder-decoder, and its scores."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from tinybert_jax.report.console import printable


def add_to(commands) -> None:
    """Adds the command to those of the parser; it imports JAX only when it runs."""
    text = "translate the lines of a text file with an encoder-decoder; writes a line for each line"
    command = commands.add_parser("translate", help=text, description=text)
    command.add_argument("model", help="a folder or hub id of an EncoderDecoderModel of BERTs")
    command.add_argument("data", nargs="?", type=os.path.expanduser, help="plain text (UTF-8)")
    command.add_argument("-t", "--text", action="append", help="a text, instead of a file")
    command.add_argument(
        "-o", "--output", type=os.path.expanduser, help="a file to write; default: standard output"
    )
    command.add_argument("--num-beams", type=int, default=4, help="default: 4; 1: greedy")
    command.add_argument("--length-penalty", type=float, default=1.0, help="default: 1")
    command.add_argument(
        "--max-new-tokens", type=int, help="of a translation; default: twice the source, and 16"
    )
    command.add_argument("--max-length", type=int, help="tokens of a source; default: all")
    command.add_argument(
        "--reference",
        type=os.path.expanduser,
        help="a file of right translations: BLEU and chrF go to standard error",
    )
    command.add_argument(
        "--tokenize", default="13a", help="words of BLEU: 13a (default), intl, zh, char, none"
    )
    command.set_defaults(act=_translate)


def _translate(arguments, command: str) -> int:
    from tinybert_jax.data.corpus import read_lines
    from tinybert_jax.inference import seq2seq

    if bool(arguments.data) == bool(arguments.text):
        got = "both" if arguments.data else "neither"
        raise ValueError(f"translate: expected a file or --text, got {got}; give exactly one")
    output = Path(arguments.output) if arguments.output else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(
            f"--output: expected a file in a folder that exists, got {output}; correct it"
        )
    names = ("num_beams", "length_penalty", "max_new_tokens", "max_length")
    with contextlib.redirect_stdout(sys.stderr):  # nothing but lines on standard output
        lines = read_lines(arguments.data, keep_blank=True) if arguments.data else arguments.text
        references = _references(arguments, len(lines))
        model = seq2seq.TinyBertForConditionalGeneration.from_pretrained(arguments.model)
        options = {name: getattr(arguments, name) for name in names}
        found = seq2seq.translate(model, lines, **options)
    if told := found.describe():
        print(told, file=sys.stderr)
    text = printable("".join(line + "\n" for line in found.lines))
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if references:
        _print_scores(found.lines, references, arguments.tokenize)
    return 0


def _references(arguments, num_lines: int) -> list[str]:
    """The lines of the file of references; raises ValueError for one that does not fit."""
    from tinybert_jax.data.corpus import read_lines
    from tinybert_jax.metrics import translation

    if not arguments.reference:
        return []
    translation.check_installed()
    if arguments.tokenize not in translation.WORDS:
        raise ValueError(
            f"--tokenize: expected one of {', '.join(translation.WORDS)}, got "
            f"{arguments.tokenize!r}; choose one of them"
        )
    references = read_lines(arguments.reference, keep_blank=True)
    if len(references) != num_lines:
        raise ValueError(
            f"--reference: expected a line for each of the {num_lines} sources, got "
            f"{len(references)} lines in {arguments.reference}; give the file that belongs to them"
        )
    return references


def _print_scores(lines: list[str], references: list[str], words: Any) -> None:
    """Scores on standard error; lines whose reference is blank are left out and counted."""
    from tinybert_jax.metrics.translation import translation_scores

    scored = [line for line, own in zip(lines, references, strict=True) if own]
    filled = [own for own in references if own]
    if len(filled) < len(lines):
        print(f"not scored, without a reference: {len(lines) - len(filled)}", file=sys.stderr)
    for score in translation_scores(scored, filled, words):
        print(f"{score.name} {score.value:.2f}  ({score.signature})", file=sys.stderr)
