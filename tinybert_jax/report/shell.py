"""The frame of every HTML page: its head, its policy and its sections."""

import html
from collections.abc import Iterable, Sequence

from tinybert_jax.report.style import STYLE

# The browser may fetch nothing, whatever the names in the files of a run contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def whole_page(title: str, header: str, sections: Iterable[tuple[str, str]]) -> str:
    """A page that needs no network; sections without content are left out.

    `title` is plain text; `header`, the titles of the sections and their contents are HTML.
    """
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header>{header}</header>{body}</main></body></html>\n"
    )


def table(names: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = "plain") -> str:
    """A table of plain text, which is escaped, with a line of names."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{css_class}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
