"""The pages of the documentation site, their code, and the extension that checks their API names.

Importing this module puts docs/ on the path, because the extension lies there.
"""

from __future__ import annotations

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS)]

import api_names  # noqa: E402
import included  # noqa: E402, F401 (for tests)

# Sources of the site; those of the API hold no code but directives.
PAGES = sorted(
    path for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if not path.name.endswith(".in.md")
)
_BLOCK = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
_FROM_PROGRAMS = re.compile(r"<!-- code: .*?<!-- end of code -->", re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. (\w+):: ([\w.]+)(?:\(\))?$((?:\n   :.*)*)", re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each fenced block that does not come from a program."""
    return [(b[2].strip(), b[3]) for b in _BLOCK.finditer(_FROM_PROGRAMS.sub("", page))]


def code(page: str) -> str:
    """All Python of a page that does not come from a program, as one text."""
    return "\n".join(text for language, text in blocks(page) if language == "python")


def documented() -> set[str]:
    """Full names of everything that the directives in docs/api/ document."""
    names: set[str] = set()
    for path in sorted((DOCS / "api").glob("*.md")):
        module = ""
        for kind, given, options in _DIRECTIVE.findall(path.read_text()):
            if kind in ("currentmodule", "automodule"):
                module = given
            elif kind.startswith("auto") and kind != "autosummary":
                name = given if given.startswith("jax_ep.") else f"{module}.{given}"
                names.add(name)
                names |= set(_members(name, options))
    return names


def _members(name: str, options: str) -> list[str]:
    """Public members that the options of a directive take along."""
    mine = [full for full in api_names.public_names() if full.rpartition(".")[0] == name]
    return [
        full
        for full in mine
        if (":special-members: __call__" if full.endswith("__") else ":members:") in options
    ]
