"""The formula of what crosses the network (``tests/cuda/network_traffic.h``), against plain loops."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import exact_steps
import network_traffic
from network_traffic import Traffic

pytestmark = [
    pytest.mark.one_process("computes on the host"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

SIZES = exact_steps.Sizes(tokens=50, hidden=264)
EXPERTS = 4 * SIZES.local_experts


def count_rows(choices: np.ndarray, host: int) -> int:
    """Tokens with an expert on one of two hosts."""
    each = EXPERTS // 2
    return sum(any(e >= 0 and e // each == host for e in token) for token in choices.tolist())


@pytest.mark.parametrize("name", exact_steps.NAMES)
@pytest.mark.parametrize("host", [0, 1])
def test_dispatch_and_combine(name, host):
    number = exact_steps.NAMES.index(name)
    idx = exact_steps.host_routes(SIZES, i=3, number=number, ranks=4, hosts=2)[1]
    rows = count_rows(idx, host)
    sizes = {"hosts": 2, "num_experts": EXPERTS, "row_bytes": 4 * 264, "chunk_bytes": 8192}
    # A row of 1056 bytes, with two weights in 16 bytes: seven fit in a chunk, behind its header of 128.
    assert network_traffic.of_dispatch(idx, host=host, **sizes) == Traffic(
        puts=8, put_bytes=8 * 128 + rows * (1056 + 16), signals=16
    )
    assert network_traffic.of_combine(idx, host=host, **sizes) == Traffic(
        puts=8, put_bytes=8 * 128 + rows * 1056, signals=16
    )


def test_short_rows_fill_no_more_than_a_window():
    """A chunk has at most 32 rows, however large it is."""
    idx = np.zeros((65, 1), np.int32)
    sizes = {"hosts": 2, "num_experts": 4, "row_bytes": 16, "chunk_bytes": 1 << 17}
    found = network_traffic.of_dispatch(idx, host=0, **sizes)
    assert found == Traffic(puts=3, put_bytes=3 * 128 + 65 * 32, signals=6)


@pytest.mark.parametrize(
    ("lanes", "tokens", "puts"),
    [
        (1, 4096, 228),  # a chunk has room for 18 rows
        (24, 4096, 256),  # 11 windows of 16 for a lane, 176 tokens; of 18 there would be 10, 180
        (50, 4096, 293),  # 6 of 14, 84 tokens; of 18 there would be 5, 90
        (24, 128, 22),  # all lanes have something
        (24, 40, 14),  # but windows have at least three such rows
    ],
)
def test_lanes_have_equal_shares(lanes, tokens, puts):
    idx = np.zeros((tokens, 1), np.int32)
    sizes = {"hosts": 2, "num_experts": 4, "row_bytes": 2 * 7168, "chunk_bytes": 1 << 18}
    found = network_traffic.of_combine(idx, host=0, lanes=lanes, **sizes)
    assert found == Traffic(puts, put_bytes=puts * 128 + tokens * 2 * 7168, signals=2 * puts)


def test_plan():
    assert network_traffic.of_plan(50, 3) == Traffic(puts=1, put_bytes=300, signals=1)


def test_sums():
    one, other = Traffic(1, 2, 3), Traffic(10, 20, 30)
    assert one + other == Traffic(11, 22, 33) and (one + other) - one == other
