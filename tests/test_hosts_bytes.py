"""What crosses the network between hosts: each row once to each other host that needs it, no more."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import exact_steps
import jax_ep
import late_network
import lockstep
import logical_hosts
import network_traffic
from jax_ep._groups import network
from network_traffic import Traffic
from spmd import create_group, make_mesh, put, shard

RANKS = lockstep.COUNT
PER_HOST = logical_hosts.PROCESSES or 1
HOSTS = RANKS // PER_HOST
SIZES = exact_steps.Sizes(tokens=77, hidden=264)
EXPERTS = RANKS * SIZES.local_experts

pytestmark = [pytest.mark.gpu, late_network.needs_late_network]


def programs(group: jax_ep.Group, layout: str):
    """A plan with its dispatch, and a combine along its handle."""

    def dispatch(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS, layout=layout)
        return out.tokens, out.handle

    def combine(rows, handle):
        return jax_ep.combine(rows, handle, group=group)

    return [jax.jit(shard(fn, group.mesh)) for fn in (dispatch, combine)]


def handed_over() -> tuple[list[Traffic], list[int]]:
    """What this process has sent to each, once the network is quiet; and anything else it did."""
    found = late_network.settled(range(RANKS))
    traffic = [Traffic(one["puts"], one["put_bytes"], one["signals"]) for one in found]
    return traffic, [one[name] for one in found for name in ("gets", "atomics", "lost")]


def difference(before: list[Traffic], after: list[Traffic]) -> list[Traffic]:
    return [b - a for a, b in zip(before, after, strict=True)]


def expected(of_pair) -> list[Traffic]:
    """``of_pair(rank, host)`` for the counterparts of this rank on other hosts; nothing for others."""
    me = jax.process_index()
    return [
        of_pair(rank, rank // PER_HOST)
        if rank % PER_HOST == me % PER_HOST and rank != me
        else Traffic()
        for rank in range(RANKS)
    ]


@pytest.mark.parametrize("name", ["spread", "one_host", "silent_rank", "nothing"])
@pytest.mark.parametrize("layout", ["expert", "token"])
def test_bytes(layout, name):
    mesh, me = make_mesh(RANKS), jax.process_index()
    group = create_group(mesh, backend="cuda", timeout=50)
    dispatch, combine = programs(group, layout)
    number = exact_steps.NAMES.index(name)
    idx = exact_steps.host_routes(SIZES, i=3, number=number, ranks=RANKS, hosts=HOSTS)
    x = np.random.default_rng(1).standard_normal((RANKS * SIZES.tokens, SIZES.hidden), np.float32)
    weights = np.ones((RANKS * SIZES.tokens, SIZES.top_k), np.float32)
    given = put((x, idx.reshape(-1, SIZES.top_k), weights), mesh)
    sizes = {
        "hosts": HOSTS,
        "num_experts": EXPERTS,
        "row_bytes": 4 * SIZES.hidden,
        "chunk_bytes": network.settings_for(HOSTS).chunk_bytes,
    }
    plan = network_traffic.of_plan(SIZES.tokens, SIZES.top_k)

    def sent_to(rank: int, host: int) -> Traffic:
        return plan + network_traffic.of_dispatch(idx[me], host=host, **sizes)

    def home_to(rank: int, host: int) -> Traffic:
        return network_traffic.of_combine(idx[rank], host=me // PER_HOST, **sizes)

    before, others = handed_over()
    lockstep.exchange.swap(None, range(RANKS))  # nobody begins while another one still counts
    rows, handle = jax.block_until_ready(dispatch(*given))
    between, _ = handed_over()
    lockstep.exchange.swap(None, range(RANKS))
    jax.block_until_ready(combine(rows, handle))
    after, others_after = handed_over()
    group.check()
    assert difference(before, between) == expected(sent_to)
    assert difference(between, after) == expected(home_to)
    assert others_after == others
