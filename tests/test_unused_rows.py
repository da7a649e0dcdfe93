"""Rows past the last group that nobody has to write: what is left of them, and what reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import oracle
import routings
from spmd import fields, make_group, ranks_at_most, shard, stacked_jit

RANKS, TOKENS, TOP_K, HIDDEN, EXPERTS = ranks_at_most(3), 9, 3, 128, 12
EXPERTS = oracle.round_up(EXPERTS, RANKS)
CASES = {
    "expert": {"layout": "expert"},
    "aligned": {"layout": "expert", "alignment": 8},
    "bounded": {"layout": "expert", "capacity": 26},
    "token": {"layout": "token"},
    "fp8": {"layout": "expert", "quantization": "fp8", "output": "quantized"},
    "dense fp8": {"layout": "token", "quantization": "fp8", "output": "dense"},
}


def data():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.random((RANKS, TOKENS, TOP_K)).astype(np.float32)
    idx = routings.uniform(rng, RANKS, TOKENS, TOP_K, EXPERTS)
    idx[0, 1] = -1
    return x, weights, idx, rng


def used_until(out: jax_ep.Dispatched) -> jax.Array:
    """The number of rows up to the last group."""
    if out.handle.layout == "token":
        return (out.handle.recv_src >= 0).sum()
    return out.group_sizes.sum()


@pytest.mark.parametrize("case", CASES)
def test_used_rows_are_the_same(case, backend):
    """With their padding, weights, scales and the handle; on CPU the others are NaN."""
    group = make_group(RANKS, backend)

    def run(x, weights, idx):
        given = {"group": group, "num_experts": EXPERTS} | CASES[case]
        want = jax_ep.dispatch(x, idx, weights, **given)
        got = jax_ep.dispatch(x, idx, weights, unused_rows="undefined", **given)
        again = jax_ep.dispatch(
            x,
            group=group,
            handle=got.handle,
            **{k: CASES[case][k] for k in ("quantization", "output") if k in CASES[case]},
        )
        found = {}
        for name, out in (("want", want), ("got", got), ("again", again)):
            leaves, rows = fields(out.handle), out.tokens
            if isinstance(rows, jax_ep.Quantized):
                rows, leaves["scales"] = rows
            leaves["rows"] = rows.astype(jnp.float32)
            found |= {f"{name}.{leaf}": value for leaf, value in leaves.items()}
        return found | {"got.weights": got.weights, "want.weights": want.weights}, (
            used_until(want)[None]
        )

    x, weights, idx, _ = data()
    found, until = stacked_jit(run, group.mesh)(x, weights, idx)
    for name in [name.partition(".")[2] for name in found if name.startswith("want.")]:
        want, got = found[f"want.{name}"], found[f"got.{name}"]
        if name != "rows":
            oracle.assert_same(got, want, name)
    assert (until[:, 0] < found["want.rows"].shape[1]).any()
    for rank in range(RANKS):
        end = int(until[rank, 0])
        want, got = found["want.rows"][rank], found["got.rows"][rank]
        assert 0 < end <= len(want) and not want[end:].any()
        oracle.assert_same(got[:end], want[:end], "rows")
        oracle.assert_same(found["again.rows"][rank][:end], want[:end], "rows along the handle")
        if jax.default_backend() == "cpu":
            assert np.isnan(got[end:]).all() or CASES[case].get("alignment", 1) > 1


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_the_same(weighted, backend):
    """Those of all operands, though the cotangents of unused rows are undefined too."""
    group = make_group(RANKS, backend)

    def loss(x, weights, idx, unused_rows):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, unused_rows=unused_rows
        )
        used = (out.handle.recv_src >= 0)[:, None]
        # What reads rows goes by what is used, as a grouped product does.
        rows = jnp.where(used, jnp.sin(jnp.where(used, out.tokens, 0.0)), 0.0)
        fused = out.weights if weighted else None
        y = jax_ep.combine(rows, out.handle, group=group, weights=fused)
        return (y**2).sum() + (0.0 if weighted else out.weights.sum())

    def run(x, weights, idx):
        grad = jax.grad(loss, argnums=(0, 1))
        return grad(x, weights, idx, "zero"), grad(x, weights, idx, "undefined")

    x, weights, idx, _ = data()
    want, got = stacked_jit(run, group.mesh)(x, weights, idx)
    for a, b, name in zip(got, want, ("x", "weights"), strict=True):
        assert np.isfinite(b).all() and np.abs(b).max() > 0
        oracle.assert_same(a, b, f"d_{name}")


@pytest.mark.parametrize("weighted", [False, True])
def test_cotangents_of_unused_rows_are_undefined(weighted, backend):
    """In the gradient of ``combine``, by what was asked of ``dispatch``. On CPU they are NaN.

    Those of used rows, and of all weights, are the same bits as with zeros.
    """
    group = make_group(RANKS, backend)

    def run(x, weights, idx):
        found = []
        for unused_rows in "zero", "undefined":
            out = jax_ep.dispatch(
                x, idx, weights, group=group, num_experts=EXPERTS, unused_rows=unused_rows
            )
            rows = jnp.where((out.handle.recv_src >= 0)[:, None], out.tokens, 0.0)
            if weighted:

                def home(rows, fused, handle=out.handle):
                    return jax_ep.combine(rows, handle, group=group, weights=fused)

                y, pull = jax.vjp(home, rows, out.weights)
            else:

                def home(rows, handle=out.handle):
                    return jax_ep.combine(rows, handle, group=group)

                y, pull = jax.vjp(home, rows)
            found.append(pull(jnp.cos(y)))
        return *found, out.handle.recv_src

    x, weights, idx, _ = data()
    want, got, sources = stacked_jit(run, group.mesh)(x, weights, idx)
    unused = sources < 0
    assert unused.any() and np.abs(want[0][~unused]).max() > 0 and not want[0][unused].any()
    oracle.assert_same(got[0][~unused], want[0][~unused], "d_rows")
    if weighted:
        oracle.assert_same(got[1], want[1], "d_weights")
    if jax.default_backend() == "cpu":
        assert np.isnan(got[0][unused]).all()


@pytest.mark.needs_collectives
@pytest.mark.one_process("calls the layer with arrays of one process")
@pytest.mark.parametrize("own", [False, True])
def test_only_experts_of_jax_ep_get_undefined_rows(own, native_backend):
    """A product of the user's own may read all rows, and gets zeros in both directions."""
    group = make_group(RANKS, native_backend)
    seen: list[str] = []

    @jax.custom_vjp
    def all_rows(lhs, rhs, group_sizes):
        return jax_ep.grouped_dot(lhs, rhs, group_sizes) + 0 * lhs.sum()

    def forward(lhs, rhs, group_sizes):
        out, pull = jax.vjp(lambda a, b: jax_ep.grouped_dot(a, b, group_sizes), lhs, rhs)
        return out + 0 * lhs.sum(), pull

    def backward(pull, d_out):
        seen.append("backward")
        d_lhs, d_rhs = pull(d_out)
        return d_lhs + 0 * d_out.sum(), d_rhs, None

    all_rows.defvjp(forward, backward)
    sizes = {"hidden": HIDDEN, "intermediate": 16, "num_experts": EXPERTS}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes)
    x = jax.random.normal(jax.random.key(1), (RANKS * TOKENS, HIDDEN))

    def loss(x, params):
        y, aux = jax_ep.moe(
            x,
            params,
            group=group,
            num_experts=EXPERTS,
            top_k=TOP_K,
            grouped_dot=all_rows if own else None,
        )
        return (y**2).sum() + aux.aux_loss

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(x, params).as_text()
    marks = {
        line.partition("unused_rows = ")[2][:1]
        for line in text.splitlines()
        if "@jax_ep_dispatch(" in line or "@jax_ep_plan_dispatch(" in line
    }
    assert marks == {"0" if own else "1"} and bool(seen) == own
    for leaf in jax.tree.leaves(step(x, params)):
        assert np.isfinite(np.asarray(leaf)).all()


def test_errors_say_what_was_expected():
    group = make_group(RANKS, "reference")

    def start(**kwargs):
        def run(x, idx):
            out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, unused_rows="zero")
            jax_ep.dispatch(x, group=group, handle=out.handle, **kwargs)
            return jnp.zeros((1,))

        x, _, idx, _ = data()
        arrays = (jnp.concatenate(list(x)), jnp.concatenate(list(idx)))
        jax.eval_shape(shard(run, group.mesh, check_vma=False), *arrays)

    start(unused_rows="zero")
    with pytest.raises(
        ValueError, match=r"unused_rows: expected 'zero', as the handle says, or None"
    ):
        start(unused_rows="undefined")
    with pytest.raises(
        ValueError, match=r"jax_ep\.dispatch: argument unused_rows: expected .*'undefined'"
    ):
        start(unused_rows="nothing")
