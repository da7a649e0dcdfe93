"""What the workspaces of a group have room for."""

from __future__ import annotations

import dataclasses
from typing import Any

MOST_CHANNELS = 3  # one less than csrc/cuda/core/workspace.h has room for


@dataclasses.dataclass(frozen=True)
class Room:
    """What the workspaces of a group have room for.

    Attributes:
        channels: Ops that may be in flight at once.
        latency_tokens: The most tokens of a rank in latency mode; 0: there is none.
        latency_hidden: The most channels of its rows, of 16 bits.
    """

    channels: int
    latency_tokens: int = 0
    latency_hidden: int = 0


def check_channels(channels: Any) -> None:
    """Check ``channels`` of ``create_group``."""
    if not isinstance(channels, int) or isinstance(channels, bool):
        raise TypeError(
            f"jax_ep.create_group: argument channels: expected a Python int, got "
            f"{type(channels).__name__}; pass the number of ops that may be in flight at once."
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(
            f"jax_ep.create_group: argument channels: expected 1 to {MOST_CHANNELS} ops in flight at "
            f"once, got {channels}; order more of them with after=."
        )
