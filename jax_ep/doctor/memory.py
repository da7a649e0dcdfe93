"""The memory that a group takes on each GPU for the network, by the formulas of the native code.

The native library counts by itself (``csrc/cuda/network/layout.h``, ``plan.h``); tests compare the two.
This is for machines without the library, and for the table in docs/network.md.
"""

from __future__ import annotations

from jax_ep._groups.network import Settings

CHUNK_SLOTS = 2  # chunks under way to one host in one lane
_WORD = 8  # bytes


def network_bytes(settings: Settings, num_hosts: int, ranks_per_host: int) -> int:
    """Bytes of each GPU that a group takes for the network.

    Args:
        settings: How it uses the network.
        num_hosts: Its hosts P.
        ranks_per_host: The ranks n of each.
    """
    slots = num_hosts * settings.num_lanes * CHUNK_SLOTS
    words = _round_up(((3 + 5 * ranks_per_host) * slots + 2) * _WORD, 1024)
    chunks = (2 + ranks_per_host) * slots * settings.chunk_bytes
    plan_words = _round_up((1 + 2 * (1 + ranks_per_host) * num_hosts) * _WORD, 1024)
    messages = 4 * num_hosts * settings.message_bytes
    return _round_up(words + chunks + plan_words + messages, 1024)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
