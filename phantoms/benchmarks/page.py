"""Pages of which each prior has a section of its own."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["with_section"]


def with_section(page: Path, introduction: str, section: str) -> str:
    """The text of ``page`` with one section written anew, or added at the end.

    Args:
        page: a file that may exist; of one with another title nothing is kept.
        introduction: from the title up to the first section.
        section: Markdown from its heading ``## ...`` on, by which it is known.
    """
    old = page.read_text() if page.exists() else ""
    title, heading = introduction.split("\n", 1)[0], section.split("\n", 1)[0]
    parts = re.split(r"^(?=## )", old, flags=re.MULTILINE)[1:]
    if old.split("\n", 1)[0] != title:
        parts = []
    sections = {part.split("\n", 1)[0]: part.strip() for part in parts}
    sections[heading] = section.strip()
    return "\n\n".join([introduction.strip(), *sections.values()]) + "\n"
