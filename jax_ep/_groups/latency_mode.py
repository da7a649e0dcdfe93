"""What a group knows of latency mode: the sizes that its inboxes have room for."""

from __future__ import annotations

from typing import Any

MOST_TOKENS = 512
MOST_ENTRIES = 1 << 16  # of ``topk_idx``, over all ranks
_MOST_HIDDEN = 1 << 20


def checked_sizes(tokens: Any, hidden: Any) -> tuple[int, int]:
    """``latency_tokens`` and ``latency_hidden`` of ``create_group``, both 0 or neither."""
    for name, value, most in (
        ("latency_tokens", tokens, MOST_TOKENS),
        ("latency_hidden", hidden, _MOST_HIDDEN),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"jax_ep.create_group: argument {name}: expected a Python int, got "
                f"{type(value).__name__}; pass the largest size that latency mode is used with, or 0."
            )
        if not 0 <= value <= most:
            raise ValueError(
                f"jax_ep.create_group: argument {name}: expected 0 to {most}, got {value}; use mode "
                f"'throughput' for larger sizes."
            )
    if (tokens == 0) != (hidden == 0):
        raise ValueError(
            f"jax_ep.create_group: arguments latency_tokens and latency_hidden: expected both or "
            f"neither, got {tokens} and {hidden}; latency mode needs both, and 0 and 0 are for groups "
            f"without it."
        )
    return tokens, hidden


def check_hosts(sizes: tuple[int, int], num_hosts: int) -> None:
    """Latency mode serves groups on one host."""
    if any(sizes) and num_hosts > 1:
        raise ValueError(
            f"jax_ep.create_group: argument latency_tokens: expected 0 where a group spans hosts, got "
            f"{sizes[0]} with {num_hosts} hosts; latency mode serves groups on one host so far."
        )
