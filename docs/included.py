"""A Sphinx extension: links of a file that a page includes lead where they lead in the repository.

Links in ``README.md`` of a folder are relative to that folder, and the page that includes it lies
elsewhere. So links are rewritten as the file is read: to the page that includes their target, if there
is one, else to the file, which the site offers as a download. A link to a folder, or to Markdown that
is no page, becomes its text.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

DOCS = pathlib.Path(__file__).resolve().parent
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)


def pages_of_files() -> dict[pathlib.Path, pathlib.Path]:
    """The page that includes each file that is included."""
    return {
        (page.parent / name).resolve(): page
        for page in DOCS.rglob("*.md")
        for name in _INCLUDE.findall(page.read_text())
    }


def rewrite(text: str, *, file: pathlib.Path, page: pathlib.Path) -> str:
    """``text`` of ``file`` with links that are right in ``page``."""
    pages = pages_of_files()

    def link(match: re.Match[str]) -> str:
        words, name, anchor = match[1], match[2], match[3] or ""
        target = (file.parent / name).resolve()
        target = pages.get(target, target)
        if target.is_dir() or (target.suffix == ".md" and not target.is_relative_to(DOCS)):
            return words
        return f"[{words}]({os.path.relpath(target, page.parent)}{anchor})"

    return _LINK.sub(link, text)


def _on_read(app: Any, relative: pathlib.Path, parent: str, content: list[str]) -> None:
    file = (DOCS / relative).resolve()
    content[0] = rewrite(content[0], file=file, page=DOCS / f"{parent}.md")


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("include-read", _on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
