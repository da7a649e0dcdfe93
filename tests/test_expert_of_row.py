"""``Dispatched.expert_of_row``: the local expert of each row, out of the group sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import oracle
import routings
from spmd import make_group, ranks_at_most, shard, stacked_jit

RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 9, 3, 128
EXPERTS = oracle.round_up(8, RANKS)
LOCAL = EXPERTS // RANKS
CASES = {
    "plain": {},
    "undefined rows": {"unused_rows": "undefined"},
    "aligned": {"alignment": 8},
    "bounded": {"capacity": 20},
    "bounded and aligned": {"capacity_factor": 0.7, "alignment": 4},
    "fp8": {"quantization": "fp8", "output": "quantized"},
}


def data(pattern: str):
    """Token r·T + t of rank r has r·T + t + 1 in all channels."""
    ids = np.arange(1, RANKS * TOKENS + 1, dtype=np.float32).reshape(RANKS, TOKENS, 1)
    sizes = {"ranks": RANKS, "tokens": TOKENS, "top_k": TOP_K, "experts": EXPERTS}
    return np.tile(ids, (1, 1, HIDDEN)), routings.make(pattern, **sizes, seed=6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", ["uniform", "one_expert"])
def test_of_each_row(case, pattern, backend):
    """As many rows of each expert as its group has, then L; and tokens are where they belong."""
    group = make_group(RANKS, backend)
    x, idx = data(pattern)

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, **CASES[case])
        again = jax_ep.dispatch(x, group=group, handle=out.handle)
        handle = out.handle
        return out.expert_of_row, again.expert_of_row, out.group_sizes, handle.recv_src

    found, again, group_sizes, sources = stacked_jit(run, group.mesh)(x, idx)
    np.testing.assert_array_equal(found, again)
    assert found.dtype == np.int32
    for rank in range(RANKS):
        groups = np.repeat(np.arange(LOCAL), group_sizes[rank])
        end = len(groups)
        np.testing.assert_array_equal(found[rank, :end], groups)
        np.testing.assert_array_equal(found[rank, end:], LOCAL)
        used = sources[rank] >= 0
        chosen = idx.reshape(-1)[sources[rank][used]]  # (rank·T + token)·K + k
        np.testing.assert_array_equal(found[rank][used] + rank * LOCAL, chosen)
    assert (sources >= 0).any() and (found < LOCAL).any()
    if case in ("plain", "undefined rows"):
        assert (found == LOCAL).any()


def test_without_any_row(backend):
    group = make_group(RANKS, backend)

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
        return out.expert_of_row

    x, idx = data("uniform")
    found = stacked_jit(run, group.mesh)(x, np.full_like(idx, -1))
    assert found.size > 0 and (found == LOCAL).all()


def test_it_indexes_arrays_of_the_experts(backend):
    """Inside scan and vmap, and filled with zeros where there is no expert."""
    group = make_group(RANKS, backend)
    table = np.arange(1.0, EXPERTS + 1, dtype=np.float32).reshape(RANKS, LOCAL, 1)

    def run(x, idx, table):
        def step(carry, _):
            out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
            look_up = lambda t: t.at[out.expert_of_row].get(mode="fill", fill_value=0)  # noqa: E731
            rows = jax.vmap(look_up)(jnp.stack([table, 2 * table])).sum(0)
            y = jax_ep.combine(jnp.broadcast_to(rows, out.tokens.shape), out.handle, group=group)
            return carry + y, None

        return jax.lax.scan(step, jnp.zeros_like(x), None, length=2)[0]

    x, idx = data("uniform")
    assert (idx >= 0).all()
    found = stacked_jit(run, group.mesh)(x, idx, table)
    want = 2 * 3 * (idx + 1.0).sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape))


def test_layout_token_has_none():
    group = make_group(RANKS, "reference")

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, layout="token")
        assert not hasattr(out, "expert_of_row")
        text = r"Dispatched: attribute expert_of_row: expected layout 'expert', got 'token'; .*idx"
        with pytest.raises(AttributeError, match=text):
            _ = out.expert_of_row
        return jnp.zeros((1,))

    x, idx = data("uniform")
    arrays = (jnp.concatenate(list(x)), jnp.concatenate(list(idx)))
    jax.eval_shape(shard(run, group.mesh, check_vma=False), *arrays)
