"""The native CPU module as its tests use it: a small problem, and plans made by the module itself."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jax_ep
import routings
from jax_ep._backends import native
from jax_ep._core import libraries
from jax_ep._core.types import Handle

if jax.default_backend() != "cpu":
    pytest.skip("tests of the CPU backend", allow_module_level=True)
if reason := libraries.why_unavailable():
    pytest.fail(reason, pytrace=False)

RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN, CAPACITY = 2, 4, 2, 4, 8, 64
UNBOUNDED = 2**31 - 1  # rows of one expert


def indices(ranks: int = RANKS, tokens: int = TOKENS) -> np.ndarray:
    """``[ranks, tokens, TOP_K]`` different experts of each token."""
    return routings.uniform(np.random.default_rng(0), ranks, tokens, TOP_K, EXPERTS)


def plan(
    idx, group: jax_ep.Group, layout="expert", capacity=CAPACITY, alignment=8, experts=EXPERTS
) -> Handle:
    """The plan of ``idx``, inside a function that runs on every rank."""
    return native.plan(
        idx,
        group=group,
        num_experts=experts,
        layout=layout,
        capacity=capacity,
        alignment=alignment,
        expert_capacity=UNBOUNDED,
    )
