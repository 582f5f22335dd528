"""How Sphinx builds the manual: `python -m sphinx -W -n --keep-going -b html docs docs/_build`.

Nothing is read from the network, and the pages read nothing from it: no fonts, formulas as MathML.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import generate

import tinybert_jax

project = "tinybert_jax"
author = "The tinybert_jax authors"
copyright = f"2026, {author}"
version = release = tinybert_jax.__version__

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"tinybert_jax {version}"
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["manual.css"]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", lambda *_: [f"reference/{name}" for name in generate.PAGES])
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, name: str, source: list[str]) -> None:
    """Adds what is generated; a link to a file outside of the manual becomes the file's name."""
    outside = r"\[([^]]*)\]\(" + r"\.\./" * (name.count("/") + 1) + r"[^)]*\)"
    source[0] = re.sub(outside, r"\1", generate.fill(source[0]))


def _formula(translator: Any, node: nodes.Element) -> None:
    is_block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=is_block)
    translator.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode
