"""The Python of README and of the pages runs as shown, and troubleshooting quotes real messages."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re

import jax
import pytest

from site_pages import DOCS, PAGES, ROOT, code

pytestmark = [
    pytest.mark.one_process("reads results of one process"),
    pytest.mark.needs_collectives,
]
# Each code once: that of README is also on the site's first page.
WITH_CODE = list({code(path.read_text()): path for path in reversed(PAGES)}.values())[::-1]
WITH_CODE = [path for path in WITH_CODE if code(path.read_text())]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_page_runs(path, monkeypatch):
    """All blocks of a page, one after the other; a job of several processes is one process here."""
    calls = []
    of_jax = inspect.signature(jax.distributed.initialize)

    def initialize(*args, **kwargs):
        calls.append(of_jax.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("PROCESS_ID", "9")
    monkeypatch.setenv("NUM_PROCESSES", "16")
    names: dict[str, object] = {}
    exec(compile(code(path.read_text()), str(path), "exec"), names)
    if "jax.distributed.initialize(" in code(path.read_text()):
        assert [(c["num_processes"], c["process_id"]) for c in calls] == [(16, 9)]
    if "y" in names:
        assert names["y"].shape == names["x"].shape


def test_pages_with_code_are_found():
    assert {"README", "start", "decode", "fp8", "network"} <= {path.stem for path in WITH_CODE}
    assert code((ROOT / "README.md").read_text()) == code((DOCS / "index.md").read_text())


# ---- troubleshooting


def texts_of_python(path: pathlib.Path) -> list[str]:
    """String literals of a file, with "…" for what an f-string or a format fills in."""
    texts = []
    tree = ast.parse(path.read_text())
    docstrings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in (n for n in ast.walk(tree) if n not in docstrings):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def texts_of_cpp(path: pathlib.Path) -> list[str]:
    """String literals of a file, of which neighbours are one, with "…" for what is added between."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    joined = re.sub(r'"\s*"', "", text)
    return re.sub(r'"\s*\+[^";]*?\+\s*"', "…", joined).split('"')[1::2]


def test_troubleshooting_quotes_what_the_sources_say():
    if not (ROOT / "csrc" / "transport" / "network" / "nvshmem.cc").exists():
        pytest.skip("Bazel's sandbox has only some of the sources")
    sources = [t for path in (ROOT / "jax_ep").rglob("*.py") for t in texts_of_python(path)]
    sources += [t for path in (ROOT / "csrc").rglob("*.cc") for t in texts_of_cpp(path)]
    page = (DOCS / "guides" / "troubleshooting.md").read_text()
    quotes = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(quotes) > 30
    for quote in quotes:
        parts = [part.strip() for part in quote.split("…") if part.strip()]
        pattern = re.compile(r".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in sources), f"no source says {quote!r}"
    entries = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    assert all("**Cause.**" in entry and "**Fix.**" in entry for entry in entries)
    assert not any("process that never was is gone" in text for text in sources)
