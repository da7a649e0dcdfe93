"""What users read of a failure that a GPU kernel has recorded."""

from __future__ import annotations

import pytest

cuda = pytest.importorskip("jax_ep._cuda", reason="the GPU backend was not built (no nvcc)")

# csrc/cuda/core/workspace.h: ErrorKind
TIMEOUT, MISMATCH, ABORTED, LOST, UNREACHABLE, CONCURRENT, MISPLACED = range(1, 8)
# The same: WordKind
NONE, ARRIVAL, CLOSE, ADDRESS, TOTAL, MESSAGE, SUM, RECEIPT = range(8)
FLAGS = "; expected epoch 3 tag 7, saw epoch 2 tag 9"


def text(
    kind: int,
    *,
    rank: int = 1,
    peer: int = 0,
    word: int = ARRIVAL,
    expected: int = 3 << 16 | 7,
    seen: int = 2 << 16 | 9,
) -> str:
    return cuda.error_text(kind, rank, peer, op=2, word=word, expected=expected, seen=seen)


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
    """The text names flags only if the kernel has met flags."""
    assert text(kind) == (
        f"jax_ep.CommunicationError: rank 1, op combine, phase arrival: {said}. "
        "The group takes no more ops; make it again with jax_ep.create_group."
    )


EPOCH = 5 << 32 | 70_000  # words carry some of its bits


@pytest.mark.parametrize(
    ("word", "phase", "expected", "seen", "said"),
    [
        (CLOSE, "close", 3 << 16 | 7, 2 << 16 | 9, FLAGS),
        (
            ADDRESS,
            "arrival",
            EPOCH & 0xFFFF,
            0x123456 << 16 | 4463,
            "; expected the address of publication 4464 modulo 65536,"
            " saw that of publication 4463 modulo 65536",
        ),
        (
            ADDRESS,
            "arrival",
            1,
            0,
            "; expected the address of publication 1 modulo 65536, saw none",
        ),
        (
            TOTAL,
            "rows",
            EPOCH,
            37 << 32 | 69_999,
            "; expected the total of epoch 70000, saw that of epoch 69999",
        ),
        (
            MESSAGE,
            "arrival",
            EPOCH,
            0xFFFFFFFF << 32 | 69_998,
            "; expected the message of epoch 70000, saw that of epoch 69998",
        ),
        (MESSAGE, "arrival", EPOCH, 0, "; expected the message of epoch 70000, saw none"),
        (
            SUM,
            "rows",
            70_000 << 32 | 12,
            70_000 << 32,
            "; expected the sum of epoch 70000, token 12, saw that of epoch 70000, token 0",
        ),
        (
            RECEIPT,
            "rows",
            70_000 << 32 | 12,
            69_998 << 32 | 13,
            "; expected the receipt for the sum of epoch 70000, token 12,"
            " saw that of epoch 69998, token 13",
        ),
        (
            RECEIPT,
            "rows",
            1 << 32,
            0,
            "; expected the receipt for the sum of epoch 1, token 0, saw none",
        ),
    ],
)
def test_words_are_told_as_they_are_packed(word, phase, expected, seen, said):
    told = text(TIMEOUT, word=word, expected=expected, seen=seen)
    assert f"op combine, phase {phase}: waited 0.000000 s for rank 0{said}. The group" in told


def test_nobody_waits_for_itself():
    assert "another rank of the group failed. The group" in text(ABORTED, peer=1)


def test_place_in_the_mesh():
    said = text(MISPLACED, expected=5)
    assert "as rank 0 of group 131081 along" in said and "as rank 1 of group 5;" in said
    assert said.endswith("make the group with the mesh that shard_map runs on.")
