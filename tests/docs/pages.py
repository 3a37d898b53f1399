"""Read the fenced blocks of Markdown pages."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


class Fence(NamedTuple):
    """Hold a fenced block: its language, its text and title="...", and the page's line."""

    language: str
    title: str
    text: str
    line: int


def fences(page: pathlib.Path) -> Iterator[Fence]:
    """Yield the fenced blocks of a page in order, without their indentation."""
    source = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(source):
        indent, _, info, text = match.groups()
        language, _, attributes = info.strip().partition(" ")
        title = re.search(r'title="([^"]*)"', attributes)
        lines = [line.removeprefix(indent) for line in text.splitlines(keepends=True)]
        yield Fence(
            language,
            title[1] if title else "",
            "".join(lines),
            source.count("\n", 0, match.start()) + 1,
        )


def titled(page: pathlib.Path) -> dict[str, str]:
    """Return the text of each block that has a title, by its title."""
    return {fence.title: fence.text for fence in fences(page) if fence.title}
