"""docs/guides/: pages that show what runs; and what the guide of settings says about rows."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_ep
import spmd
from guide_pages import ROOT, pages, settings
from jax_ep._core import capacity

pytestmark = [
    pytest.mark.one_process("reads files, and calls layers with arrays of one process"),
    pytest.mark.needs_collectives,
]
GUIDES = sorted(pages.GUIDES.glob("*.md"))
PROGRAMS = [*sorted(pages.EXAMPLES.glob("port_*.py")), pages.EXAMPLES / "overlap.py"]
by_name = pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)


# ---- pages


@by_name
def test_guide_is_current(path):
    page = path.read_text()
    assert pages.render(page) == page, "run python docs/render_guides.py"


def test_all_code_of_models_comes_from_programs():
    """That of other guides runs in test_page_code."""
    for name in ("flax_nnx", "flax_linen", "maxtext", "settings"):
        page = (pages.GUIDES / f"{name}.md").read_text()
        assert "```python" in page and "```" not in pages._CODE.sub("", page)


@by_name
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text().replace("\n", " "))
    assert links and all((path.parent / link).exists() for link in links)
    index = (ROOT / "docs" / "index.md").read_text()
    assert re.search(rf"^(.* <)?guides/{path.stem}>?$", index, re.MULTILINE)


def test_each_part_of_a_program_is_shown():
    shown = {
        match.group(2, 3) for page in GUIDES for match in pages._CODE.finditer(page.read_text())
    }
    parts = {
        (path.name, name)
        for path in PROGRAMS
        for name in re.findall(r"^ *# \[(.*)\]$", path.read_text(), re.MULTILINE)
        if name != "end"
    }
    assert parts == shown and len(PROGRAMS) == 5


def test_check_finds_old_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "GUIDES", tmp_path)
    page = tmp_path / "settings.md"
    page.write_text("<!-- code: port_settings.py report -->\nold\n<!-- end of code -->\n")
    monkeypatch.setattr("sys.argv", ["render_guides.py", "--check"])
    assert pages.main() == 1 and "settings.md is out of date" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["render_guides.py"])
    assert pages.main() == 0 and "aux.num_dropped / aux.load.sum()" in page.read_text()
    with pytest.raises(ValueError, match=r"port_nnx.py: expected one part \[nothing\], got 0"):
        pages.part("port_nnx.py", "nothing")


# ---- settings


def make_group() -> jax_ep.Group:
    ranks = spmd.ranks_at_most(4)
    return jax_ep.create_group(spmd.make_mesh((ranks,), ("expert",), AxisType.Auto), "expert")


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("factor", [None, 1.25, 1000.0])
def test_rows_are_those_that_dispatch_has_room_for(ranks, factor):
    sizes = {"top_k": 8, "num_experts": 128}
    rows, size = settings.memory(
        tokens=100, hidden=64, intermediate=32, ranks=ranks, factor=factor, **sizes
    )
    want = capacity.lossless_capacity(
        num_ranks=ranks,
        num_tokens=100,
        top_k=8,
        num_local_experts=128 // ranks,
        layout="expert",
        alignment=1,
    )
    if factor is not None:
        bound = capacity.rows_per_rank(
            rank_capacity_factor=factor, num_tokens=100, top_k=8, alignment=1
        )
        want = min(want, bound)
    assert rows == want
    assert size == rows * (2 * 64 + 3 * 32) * 2


def saved_bytes(layer, x, params, mask, rows: int) -> int:
    """Bytes of the float arrays with ``rows`` rows that are kept for the backward pass."""
    kept = jax.eval_shape(
        lambda x, params: jax.tree.leaves(jax.vjp(lambda *a: layer(*a, mask)[0], x, params)[1]),
        x,
        params,
    )
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    of_rows = [leaf for leaf in floats if leaf.ndim == 2 and leaf.shape[0] == rows]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in of_rows)


def layer_that_saves(names: tuple[str, ...] | None, group: jax_ep.Group, num_experts: int):
    """That of the guide where it saves these names; else one that differs in them alone."""
    if names == ("jax_ep.handle",):
        return settings.make_layer(group, num_experts, rank_capacity_factor=1.25)
    options = {"group": group, "num_experts": num_experts, "top_k": settings.TOP_K}

    def layer(x, params, mask):
        return jax_ep.moe(x, params, mask=mask, rank_capacity_factor=1.25, **options)

    if names is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(layer, policy=policy)


TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine")


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        (None, (1, 2, 2)),
        ((), (2, 3, 2)),
        (("jax_ep.handle",), (1, 3, 2)),
        (("jax_ep.handle", "jax_ep.dispatch"), (1, 2, 2)),
    ],
    ids=["no remat", "plain", "handle", "handle and dispatch"],
)
def test_what_each_policy_saves(names, calls):
    """The table of the guide: the ops that run again, and the rows that are kept."""
    group = make_group()
    x, params, mask = settings.make_data(group)
    num_experts = 4 * group.size
    layer = layer_that_saves(names, group, num_experts)
    sizes = {"hidden": settings.HIDDEN, "intermediate": settings.INTERMEDIATE}
    sizes |= {"top_k": settings.TOP_K, "num_experts": num_experts, "ranks": group.size}
    rows, _ = settings.memory(tokens=32, factor=1.25, **sizes)
    saved = saved_bytes(layer, x, params, mask, rows * group.size)
    of_dispatch = rows * group.size * settings.HIDDEN * 2
    if names is None:  # at least gate, up and product, and the rows that came
        assert saved >= of_dispatch + 3 * rows * group.size * settings.INTERMEDIATE * 2
    else:
        assert saved == (of_dispatch if "jax_ep.dispatch" in names else 0)

    def loss(x, params):
        return jnp.sum(jnp.sin(layer(x, params, mask)[0].astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(x, params).compile().as_text()
    assert tuple(spmd.count_calls(text, TARGETS).values()) == calls


@pytest.mark.usefixtures("in_float32")
def test_settings_change_what_the_guide_says():
    """Remat changes nothing, a bound drops what does not fit, fp8 rounds rows.

    A quarter of the tokens is padding, so with 0.5 there is less room than even routing needs.
    """
    group = make_group()
    data = settings.make_data(group, jnp.float32)
    num_experts = 4 * group.size
    run = functools.partial(settings.run, x=data[0], params=data[1], mask=data[2])

    def plain(x, params, mask):
        y, aux = jax_ep.moe(
            x, params, group=group, num_experts=num_experts, top_k=settings.TOP_K, mask=mask
        )
        return x + y, aux

    y, aux, grads = run(plain)
    assert aux.load.sum() == data[2].sum() * settings.TOP_K and aux.num_dropped == 0
    again, _, again_grads = run(settings.make_layer(group, num_experts))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(again, y)
    jax.tree.map(close, again_grads, grads)

    bounded, aux, _ = run(settings.make_layer(group, num_experts, rank_capacity_factor=0.5))
    rows = np.ceil(0.5 * 32 * settings.TOP_K)
    excess = np.maximum(np.asarray(aux.load).reshape(group.size, -1).sum(1) - rows, 0)
    assert aux.num_dropped == excess.sum() > 0
    # Products of other shapes may round otherwise.
    changed = np.any(np.abs(bounded - y) > 1e-3, axis=-1)
    assert 0 < changed.sum() <= excess.sum()

    rounded, _, rounded_grads = run(settings.make_layer(group, num_experts, quantization="fp8"))
    assert 0 < np.abs(rounded - y).max() < 0.1 * np.abs(y - data[0]).max()
    for got, want in zip(*map(jax.tree.leaves, (rounded_grads, grads)), strict=True):
        assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_settings_program_runs(monkeypatch, capsys):
    ranks = spmd.ranks_at_most(4)
    monkeypatch.setattr(jax, "device_count", lambda: ranks)
    settings.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["bf16 rows", "fp8 rows"]
