"""``docs/api.md`` is current, and says what users need to know to call and to configure."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import re

import pytest

import jax_ep

pytestmark = pytest.mark.one_process("reads files")

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def render_api():
    spec = importlib.util.spec_from_file_location("render_api", ROOT / "docs" / "render_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current(render_api):
    assert render_api.render() == PAGE, "run python docs/render_api.py"


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_layers_have_their_arguments(name):
    layer = getattr(jax_ep, name).MoE
    (signature,) = re.findall(rf"^### `jax_ep\.{name}\.MoE\((.*)\)`$", PAGE, re.MULTILINE)
    flat = re.sub(r"\([^()]*\)", "", signature)  # without the commas of defaults
    given = [parameter.partition("=")[0] for parameter in flat.split(", ")]
    wanted = [p for p in inspect.signature(layer.__init__).parameters if p != "self"]
    # Flax Linen gives these to every module.
    assert [n for n in given if n.isidentifier()] == [
        n for n in wanted if n not in ("parent", "name")
    ]
    of_call = "x, *, mask=None, router_inputs=None, router_key=None, routing=None"
    assert f"#### `jax_ep.{name}.MoE.__call__({of_call})`" in PAGE
    assert f"#### `jax_ep.{name}.MoE.update_router_bias(load, rate=0.001)`" in PAGE


def test_groups_have_their_members_and_backends():
    for member in ("size", "other_axes", "check()"):
        assert f"#### `jax_ep.Group.{member}`" in PAGE
    entry = PAGE.partition("### `jax_ep.create_group(")[2].partition("\n### ")[0]
    (backend,) = re.findall(r"\* `backend`: (.*?)\n\*", entry, re.DOTALL)
    assert all(f'"{value}"' in backend for value in ("auto", "cpu", "cuda", "reference"))


def test_environment_variables_are_those_that_the_sources_read():
    sources = [ROOT / "csrc" / "CMakeLists.txt", ROOT / "bazel" / "python_env.bzl"]
    if not all(path.exists() for path in sources):
        pytest.skip("Bazel's sandbox has only some of the sources")
    table = PAGE.partition("## Environment variables")[2].partition("\n## ")[0]
    found: set[str] = set()
    for path in (ROOT / "jax_ep").rglob("*.py"):
        found |= set(re.findall(r"\bJAX_EP_[A-Z_]+", path.read_text()))
    builds = [ROOT / "pyproject.toml", *(ROOT / "bazel").glob("*.bzl")]
    for path in [*builds, *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cc", ".h"))]:
        read = r"""(?:env = |getenv\(|environ\.get\(|environ\[)["'](JAX_EP_[A-Z_]+)"""
        found |= set(re.findall(read, path.read_text()))
    assert {"JAX_EP_STAGING_BYTES", "JAX_EP_CUDA", "JAX_EP_PYTHON"} <= found  # the search works
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == found
