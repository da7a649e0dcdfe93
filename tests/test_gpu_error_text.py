"""What users read of a failure that a GPU kernel has recorded."""

from __future__ import annotations

import pytest

cuda = pytest.importorskip("jax_ep._cuda", reason="the GPU backend was not built (no nvcc)")

# csrc/cuda/workspace.h: ErrorKind
TIMEOUT, MISMATCH, ABORTED, LOST, UNREACHABLE, CONCURRENT, MISPLACED = range(1, 8)
FLAGS = "; expected epoch 3 tag 7, saw epoch 2 tag 9"


def text(kind: int, *, rank: int = 1, peer: int = 0, expected: int = 3 << 16 | 7) -> str:
    return cuda.error_text(kind, rank, peer, op=2, phase=0, expected=expected, seen=2 << 16 | 9)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (TIMEOUT, "waited 0.000000 s for rank 0" + FLAGS),
        (MISMATCH, "rank 0 is at another op" + FLAGS),
        (LOST, "the process of rank 0 is gone" + FLAGS),
        (ABORTED, "another rank of the group failed while this one waited for rank 0"),
        (UNREACHABLE, "an input is in memory that its peers cannot read"),
        (CONCURRENT, "another op of the group was running at the same time"),
    ],
)
def test_who_what_and_what_to_do(kind, said):
    """Flags are told only where the kernel has met flags."""
    assert text(kind) == (
        f"jax_ep.CommunicationError: rank 1, op combine, phase arrival: {said}. "
        "The group takes no more ops; make it again with jax_ep.create_group."
    )


def test_nobody_waits_for_itself():
    assert "another rank of the group failed. The group" in text(ABORTED, peer=1)


def test_place_in_the_mesh():
    said = text(MISPLACED, expected=5)
    assert "as rank 0 of group 131081 along" in said and "as rank 1 of group 5;" in said
    assert said.endswith("make the group with the mesh that shard_map runs on.")
