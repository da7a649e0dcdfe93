"""What may go wrong between hosts, in many steps that check themselves: late flags, short rings, skew.

``tests/run_hosts.py`` runs it in each process of logical hosts, best with ``--late``, and once more
with the smallest chunks (``--chunk-bytes 8192 --lanes 1``). On CPU the reference runs the same steps.
"""

from __future__ import annotations

import functools

import jax
import pytest

import exact_steps
import lockstep
import logical_hosts
from exact_steps import Sizes
from jax_ep._groups import network
from spmd import create_group, make_mesh

RANKS = lockstep.COUNT
STEPS = 120 if jax.default_backend() == "gpu" else 2
FEW = 14 if jax.default_backend() == "gpu" else 2  # each routing twice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (lockstep.ACTIVE and logical_hosts.PROCESSES),
        reason="needs processes on logical hosts: tests/run_hosts.py",
    ),
]


@functools.cache
def groups(backend: str):
    """Two groups of all processes, which go on through all tests here."""
    mesh = make_mesh(RANKS)
    made = [create_group(mesh, backend=backend, timeout=t) for t in (50, 51)]
    assert len(made[0].topology.hosts) == RANKS // logical_hosts.PROCESSES
    assert made[0].transport == ("nvshmem" if backend == "cuda" else None)
    return made


@functools.cache
def program(backend: str, sizes: Sizes, steps: int, num_groups: int = 1):
    return exact_steps.program(groups(backend)[:num_groups], sizes, steps)


def settings() -> network.Settings:
    return network.settings_for(RANKS // logical_hosts.PROCESSES)


def run(backend: str, sizes: Sizes, steps: int, name: str | None = None, num_groups: int = 1):
    wrong = program(backend, sizes, steps, num_groups)(7, name)
    for group in groups(backend)[:num_groups]:
        group.check()
    assert exact_steps.explain(wrong) == {}


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_no_flag_overtakes_its_data(layout, backend):
    """Contents and routing change in each step, so rows of an earlier one would be wrong."""
    run(backend, Sizes(tokens=70, hidden=264, layout=layout), STEPS)


@pytest.mark.parametrize("name", exact_steps.NAMES)
def test_routing(name, backend):
    """All tokens to one host or rank; ranks whose tokens are all masked, or all but one; nothing."""
    run(backend, Sizes(tokens=70, hidden=264), STEPS, name)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_rings_go_round(layout, backend):
    """A chunk has one row, fewer than a team has warps, and an op uses each slot many times."""
    hidden = settings().max_row_bytes // 4
    tokens = 16 * settings().num_lanes + 1
    run(backend, Sizes(tokens=tokens, hidden=hidden, layout=layout), FEW)


def test_skew_deeper_than_a_queue(backend):
    """All ranks send all they have to one host, one row in a chunk."""
    hidden, tokens = settings().max_row_bytes // 4, 16 * settings().num_lanes + 1
    run(backend, Sizes(tokens=tokens, hidden=hidden), FEW, "one_host")


@pytest.mark.parametrize("tokens", [1, 37])
def test_odd_numbers_of_tokens(tokens, backend):
    run(backend, Sizes(tokens=tokens, hidden=20), STEPS)


def test_many_tokens(backend):
    """More windows than all lanes have slots, of short rows."""
    run(backend, Sizes(tokens=8195, hidden=4, layout="token"), 7)


def test_two_groups_in_flight(backend):
    """Both dispatch before the second combines, and then the first."""
    run(backend, Sizes(tokens=33, hidden=136), STEPS, num_groups=2)
