"""Sphinx settings of the documentation: ``make docs``.

The pages are Markdown that reads well without Sphinx, too; what a site needs beyond that is made
here: the order of pages, which is that of the links of index.md, and the API reference.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

project = "recon-sde"
author = "the recon-sde authors"
html_title = "recon-sde"
html_theme = "furo"

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "index"
exclude_patterns = ["results", "conf.py"]
html_show_sphinx = False

PACKAGES = ("inverse", "phantoms")
apidoc_modules = [
    {"path": f"../{p}", "destination": f"api/{p}", "max_depth": 1, "separate_modules": True}
    for p in PACKAGES
]
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_legacy_class_based = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
# MathML is drawn by browsers themselves: nothing is loaded from a network
html_math_renderer = "mathml"


UNKNOWN = {
    r"\\[bB]igg?[lr]?(?![a-zA-Z])": "",
    r"\\dots(?![a-zA-Z])": r"\\ldots",
    r"\\texttt(?![a-zA-Z])": r"\\text",
    r"\\([td]?frac)(\d)(\d)": r"\\\1{\2}{\3}",
}
"""LaTeX that docutils does not read, and what stands for it."""
ACCENT = re.compile(
    r"<munderover>\s*(<mi[^>]*>[^<]*</mi>)\s*((?:(?!munderover).)*?)\s*"
    r'(<mo stretchy="false">.</mo>)\s*</munderover>',
    re.DOTALL,
)
"""An accent with an index, whose index docutils sets below it."""


MARKUP = re.compile(r"(?<![\w*^\\])\*(?=\w)|(?<!\\)\|")


def _mathml(source: str, as_block: bool) -> str:
    r"""A formula; its ``\tag`` becomes a number at the right."""
    tag = re.search(r"\\tag\{(\d+)\}", source)
    formula = re.sub(r"\\tag\{\d+\}", "", source).strip()
    for pattern, known in UNKNOWN.items():
        formula = re.sub(pattern, known, formula)
    drawn = str(latex2mathml.tex2mathml(formula, as_block=as_block))
    drawn = ACCENT.sub(r"<msub><mover>\1\3</mover>\2</msub>", drawn)
    if not as_block:
        return drawn
    number = f"<span>({tag[1]})</span>" if tag else ""
    style = "display: flex; align-items: center; overflow: auto hidden"
    return f'<div class="math" style="{style}"><div style="flex: 1">{drawn}</div>{number}</div>'


def _inline(self: Any, node: Any) -> None:
    self.body.append(_mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(self: Any, node: Any) -> None:
    self.body.append(_mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def _plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The star of a shape ``(*b, 3)`` and the bars of ``|z|`` are text, not markup."""
    formula: int | None = None  # indent of the directive that a line belongs to
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and formula is not None and indent <= formula:
            formula = None
        if line.lstrip().startswith(".. math::"):
            formula = indent
        if formula is None:
            parts = re.split(r"(`[^`]*`*)", line)
            done = (p if p.startswith("`") else MARKUP.sub(r"\\\g<0>", p) for p in parts)
            lines[i] = "".join(done)


def _order(app: Any, name: str, text: list[str]) -> None:
    """Give index.md a hidden table of contents: its own links, then the API."""
    if name == "index":
        pages = re.findall(r"\]\((?!\.\.)([\w-]+)\.md\)", text[0])
        listed = "\n".join([*dict.fromkeys(pages), *(f"api/{p}/modules" for p in PACKAGES)])
        text[0] += f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def setup(app: Any) -> None:
    """Register math and contents."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("source-read", _order)
    app.connect("autodoc-process-docstring", _plain, priority=600)  # after napoleon
