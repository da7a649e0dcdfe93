"""docs/: the API pages document all that is public, with signatures and variables that users need."""

from __future__ import annotations

import inspect
import re
import sys
import types

import pytest

import jax_ep
from site_pages import DOCS, PAGES, ROOT, api_names, blocks, documented, included

pytestmark = pytest.mark.one_process("reads files")


def test_every_public_name_is_documented():
    """The build of the site checks the same by Sphinx's own inventory."""
    assert api_names.missing(documented()) == []
    assert documented() == set(api_names.public_names())
    without = documented() - {"jax_ep.Group.check", "jax_ep.nnx.MoE"}
    assert api_names.missing(without) == ["jax_ep.Group.check", "jax_ep.nnx.MoE"]
    assert {"jax_ep.dispatch", "jax_ep.routing.Router.__call__"} <= documented()


def test_each_api_page_lists_what_it_documents():
    for path in (DOCS / "api").glob("*.md"):
        page = path.read_text()
        names = re.findall(r"^\.\. auto(?:function|class|exception):: ([\w.]+)", page, re.MULTILINE)
        if ".. autosummary::" in page:
            summary = page.partition(".. autosummary::")[2].partition("\n.. auto")[0]
            listed = re.findall(r"^   (\w[\w.]*)$", summary, re.MULTILINE)
            assert sorted(listed) == sorted(name.removeprefix("jax_ep.") for name in names)
        assert f"({path.name})" in (DOCS / "api" / "index.md").read_text() or path.stem == "index"


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_layers_have_their_arguments(name):
    layer = getattr(jax_ep, name).MoE
    flat = re.sub(r"\([^()]*\)", "", api_names.signature(layer)[1:-1])  # without those of defaults
    given = [parameter.partition("=")[0] for parameter in flat.split(", ")]
    wanted = [p for p in inspect.signature(layer.__init__).parameters if p != "self"]
    # Flax Linen gives these to every module.
    assert [n for n in given if n.isidentifier()] == [
        n for n in wanted if n not in ("parent", "name")
    ]
    of_call = "(x, *, mask=None, router_inputs=None, router_key=None, routing=None)"
    assert api_names.signature(layer.__call__) == of_call
    assert api_names.signature(layer.update_router_bias) == "(load, rate=0.001)"


def test_signatures_that_pages_show():
    def shown(what, value, given="()"):
        return api_names._process_signature(None, what, "", value, None, given, None)

    assert "activation=silu" in shown("function", jax_ep.moe)[0]  # and no address
    assert shown("class", jax_ep.Group) == ("", None)  # "()" on the page: users do not make it
    assert shown("property", jax_ep.Group.size, None) == (None, None)


def test_the_build_warns_about_what_is_missing(monkeypatch):
    warnings = []
    logger = types.SimpleNamespace(warning=lambda text, name: warnings.append(text % name))
    util = types.ModuleType("sphinx.util")
    util.logging = types.SimpleNamespace(getLogger=lambda name: logger)
    monkeypatch.setitem(sys.modules, "sphinx", types.ModuleType("sphinx"))  # tests do without it
    monkeypatch.setitem(sys.modules, "sphinx.util", util)
    objects = dict.fromkeys(documented() - {"jax_ep.combine"})
    env = types.SimpleNamespace(get_domain=lambda name: types.SimpleNamespace(objects=objects))
    api_names._check(None, env)
    assert warnings == ["no page of docs/api documents jax_ep.combine"]


def test_groups_say_their_backends():
    text = inspect.getdoc(jax_ep.create_group)
    (backend,) = re.findall(r"^    backend: (.*?)\n    \w+:", text, re.DOTALL | re.MULTILINE)
    assert all(f'"{value}"' in backend for value in ("auto", "cpu", "cuda", "reference"))


def test_environment_variables_are_those_that_the_sources_read():
    sources = [ROOT / "csrc" / "CMakeLists.txt", ROOT / "bazel" / "python_env.bzl"]
    if not all(path.exists() for path in sources):
        pytest.skip("Bazel's sandbox has only some of the sources")
    page = (DOCS / "api" / "tools.md").read_text()
    table = page.partition("## Environment variables")[2].partition("\n## ")[0]
    found: set[str] = set()
    for path in (ROOT / "jax_ep").rglob("*.py"):
        found |= set(re.findall(r"\bJAX_EP_[A-Z_]+", path.read_text()))
    builds = [ROOT / "pyproject.toml", *(ROOT / "bazel").glob("*.bzl")]
    for path in [*builds, *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cc", ".h"))]:
        read = r"""(?:env = |getenv\(|environ\.get\(|environ\[)["'](JAX_EP_[A-Z_]+)"""
        found |= set(re.findall(read, path.read_text()))
    assert {"JAX_EP_STAGING_BYTES", "JAX_EP_CUDA", "JAX_EP_PYTHON"} <= found  # the search works
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_say_their_language(path):
    """Python runs in tests; nothing that looks like Python may stand in a block that does not run."""
    known = {"python", "sh", "text", "{eval-rst}", "{toctree}"}
    for language, text in blocks(path.read_text()):
        assert language in known or language.startswith("{include}"), (path, language)
        if language != "python":
            assert "import jax" not in text, path


def test_links_of_included_files():
    def rewritten(text, file):
        return included.rewrite(text, file=ROOT / file, page=DOCS / "pretrain.md")

    # To the page that includes the target, to a file for download, and to neither.
    assert rewritten("[a](launch/README.md#x)", "examples/pretrain/README.md") == "[a](launch.md#x)"
    for text, want in {
        "[a](config.py)": "[a](../examples/pretrain/config.py)",
        "[a](configs)": "a",
        "[a](../README.md)": "a",
        "[a](https://b.c)": "[a](https://b.c)",
        "![a](config.py)": "![a](config.py)",
    }.items():
        assert rewritten(text, "examples/pretrain/README.md") == want
    assert rewritten("[a](docs/network.md)", "ARCHITECTURE.md") == "[a](network.md)"
