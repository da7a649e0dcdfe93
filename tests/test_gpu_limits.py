"""Arguments that GPU kernels have no room for raise while tracing, here on any devices."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

import jax_ep
from jax_ep import reference
from jax_ep._backends import native
from jax_ep._core import limits
from jax_ep._groups import gpu_side
from jax_ep._groups.topology import Topology
from jax_ep._ops import gradients
from spmd import make_mesh, shard

library = pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")

TOKENS = 4
RING = 32 << 20
VJP = 106240
ONE_HOST = Topology(hosts=((0, 1),), processes=((0, 0),))


@pytest.fixture
def trace(monkeypatch):
    """Traces one rank of a group of GPUs, with the reference's ops in place of the group's."""
    monkeypatch.setitem(gradients._BACKENDS, "cuda", reference)

    def trace(fn, *, ranks: int = 2, backend: str = "cuda"):
        group = jax_ep.Group(
            mesh=make_mesh(ranks),
            axis_names=("expert",),
            backend=backend,
            timeout=1.0,
            id=1,
            topology=ONE_HOST,
            tuning={},
        )

        def run():
            fn(group)
            return jnp.zeros((1,))

        jax.eval_shape(shard(run, group.mesh, in_specs=(), check_vma=False))

    return trace


def dispatch(group, *, hidden=16, num_experts=4, dtype=jnp.float32, layout=None, x=None):
    x = jnp.zeros((TOKENS, hidden), dtype) if x is None else x
    topk_idx = jnp.zeros((TOKENS, 1), jnp.int32)
    return jax_ep.dispatch(
        x, topk_idx, group=group, num_experts=num_experts, layout=layout, alignment=1
    )


def test_experts(trace):
    trace(lambda group: dispatch(group, num_experts=4096))
    trace(lambda group: dispatch(group, num_experts=4098), backend="reference")
    text = r"dispatch: argument num_experts: expected at most 4096 on GPUs, got 4098; .*'reference'"
    with pytest.raises(ValueError, match=text):
        trace(lambda group: dispatch(group, num_experts=4098))


def test_experts_of_a_layer(trace):
    params = jax.eval_shape(
        lambda: jax_ep.init_moe_params(
            jax.random.key(0), hidden=8, intermediate=4, num_experts=4098
        )
    )

    def layer(params):
        group = jax_ep.Group(make_mesh(2), ("expert",), "cuda", 1.0, 1, ONE_HOST, {})
        return jax_ep.moe(jnp.zeros((4, 8)), params, group=group, num_experts=4098, top_k=2)

    with pytest.raises(
        ValueError, match="moe: argument num_experts: expected at most 4096 on GPUs"
    ):
        jax.eval_shape(layer, params)


def test_plan(trace, monkeypatch):
    """The native library says by a size below 0 that no kernel of the plan has room."""
    library = types.SimpleNamespace(plan_scratch_size=lambda *_: -1)
    monkeypatch.setattr(gpu_side, "library", lambda: library)
    monkeypatch.setitem(gradients._BACKENDS, "cuda", native)
    text = (
        r"dispatch: argument num_experts: .* room for, got 64 experts, 1 a token, on 2 ranks; use"
    )
    with pytest.raises(ValueError, match=text):
        trace(lambda group: dispatch(group, num_experts=64))


def test_size_of_plans():
    """The native library has room for all sensible plans, and says where it has none."""
    for layout in (0, 1):
        assert library.plan_scratch_size(layout, 4096, 8, 256, 8) >= 0
        assert library.plan_scratch_size(layout, 65536, 8, 4096, 8) >= 0
    assert library.plan_scratch_size(0, 4096, 32, 4096, 32) == -1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_combine(trace, ranks):
    """One sum of each of the other ranks must fit the ring."""
    most = RING // max(ranks - 1, 1) // 16 * 16

    def there_and_back(row_bytes, layout="expert"):
        def run(group):
            out = dispatch(group, hidden=row_bytes // 4, layout=layout)
            jax_ep.combine(out.tokens, out.handle, group=group)

        return run

    trace(there_and_back(most), ranks=ranks)
    trace(there_and_back(most + 16, "token"), ranks=ranks)
    trace(there_and_back(most + 16), ranks=ranks, backend="reference")
    text = (
        rf"combine: argument rows: .* at most \d+ bytes on GPUs, got hidden .* = {most + 16} bytes"
    )
    with pytest.raises(ValueError, match=text):
        trace(there_and_back(most + 16), ranks=ranks)


def test_rows_of_the_gradient_of_dispatch(trace):
    """Dispatch takes rows of any length; its gradient is a combine."""

    def forward(x, group):
        return dispatch(group, x=x).tokens.sum()

    def backward(hidden):
        return lambda group: jax.grad(forward)(jnp.zeros((TOKENS, hidden)), group)

    trace(lambda group: forward(jnp.zeros((TOKENS, RING // 4 + 4)), group))
    trace(backward(RING // 4))
    text = rf"dispatch: argument x: expected rows of at most {RING} bytes for gradients on GPUs"
    with pytest.raises(ValueError, match=text):
        trace(backward(RING // 4 + 4))


def test_rows_of_the_gradient_with_weights(trace):
    def forward(weights, group, row_bytes):
        out = dispatch(group, hidden=row_bytes // 2, dtype=jnp.bfloat16)
        y = jax_ep.combine(out.tokens, out.handle, group=group, weights=weights)
        return y.astype(jnp.float32).sum()

    def run(row_bytes, *, grad):
        call = jax.grad(forward) if grad else forward
        weights = lambda group: jnp.ones((2 * TOKENS,))  # noqa: E731
        return lambda group: call(weights(group), group, row_bytes)

    trace(run(VJP, grad=True))
    trace(run(VJP + 16, grad=False))
    text = (
        rf"combine: argument rows: .* at most {VJP} bytes for gradients with weights on GPUs, got"
    )
    with pytest.raises(ValueError, match=text):
        trace(run(VJP + 16, grad=True))


def test_limits():
    """The limits are those in the documentation."""
    assert limits.max_experts() == 4096
    assert limits.max_summed_row_bytes(1) == limits.max_summed_row_bytes(2) == RING
    assert limits.max_summed_row_bytes(5) == RING // 4
    assert limits.max_vjp_row_bytes() == VJP


@pytest.mark.parametrize("dequantized", [0, 10])
def test_scratch_of_a_dispatch_that_casts(dequantized):
    """Rows that travel in float8 with their scales, and scales of rows that are made dense."""
    size = library.dispatch_scratch_size(3, 256, dequantized)
    assert size == (3 * 256 + 128) + dequantized * 2 * 4
