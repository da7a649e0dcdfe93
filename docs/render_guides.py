"""Put the code of examples/ into docs/guides/: ``python docs/render_guides.py [--check]``.

A guide shows a part of a program between these lines, which stay in the page::

    <!-- code: port_nnx.py step -->
    <!-- end of code -->

The part is what stands in ``examples/port_nnx.py`` between ``# [step]`` and ``# [end]``. In the same
way ``<!-- table: memory -->`` to ``<!-- end of table -->`` holds the table of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import re
import sys
import textwrap
from types import ModuleType
from typing import Any

import page_text

GUIDES = pathlib.Path(__file__).with_name("guides")
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
_CODE = re.compile(r"(<!-- code: (\S+) (.+?) -->\n).*?(<!-- end of code -->)", re.DOTALL)
_MEMORY = re.compile(r"(<!-- table: memory -->\n).*?(<!-- end of table -->)", re.DOTALL)
_MODEL = {"tokens": 4096, "hidden": 7168, "intermediate": 2048, "top_k": 8, "num_experts": 256}
_RANKS = (8, 64)
_GIB = 1 << 30


def part(program: str, name: str) -> str:
    """The lines of ``examples/<program>`` between ``# [name]`` and ``# [end]``."""
    text = (EXAMPLES / program).read_text()
    found = re.findall(
        rf"^ *# \[{re.escape(name)}\]\n(.*?)\n *# \[end\]$", text, re.DOTALL | re.MULTILINE
    )
    if len(found) != 1:
        raise ValueError(f"{program}: expected one part [{name}], got {len(found)}.")
    return textwrap.dedent(found[0]).strip("\n")


def program(name: str) -> ModuleType:
    """The module ``examples/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory_table() -> str:
    """Rows and bytes of a layer, by the formula of ``port_settings.py``."""
    memory: Any = program("port_settings").memory
    rows = []
    for ranks in _RANKS:
        for factor in (None, 1.25):
            count, size = memory(**_MODEL, ranks=ranks, factor=factor)
            one = count * _MODEL["hidden"] * 2
            cells = ("none" if factor is None else str(factor), str(count))
            rows.append((str(ranks), *cells, f"{one / _GIB:.2f}", f"{size / _GIB:.2f}"))
    columns = ("ranks", "`rank_capacity_factor`", "rows", "GiB of one array of rows", "GiB of all")
    return page_text.table(columns, rows)


def render(page: str) -> str:
    """The page with its code and tables."""

    def code(block: re.Match[str]) -> str:
        return f"{block[1]}\n```python\n{part(block[2], block[3])}\n```\n\n{block[4]}"

    page = _CODE.sub(code, page)
    if _MEMORY.search(page):
        table = memory_table()
        page = _MEMORY.sub(lambda block: f"{block[1]}\n{table}\n\n{block[2]}", page)
    return page


def main() -> int:
    """Write the guides, or with --check say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a guide is out of date")
    options = parser.parse_args()
    status = 0
    for path in sorted(GUIDES.glob("*.md")):
        page = render(path.read_text())
        if not options.check:
            path.write_text(page)
        elif path.read_text() != page:
            print(f"docs/guides/{path.name} is out of date: run python docs/render_guides.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
