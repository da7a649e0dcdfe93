"""Which entries of ``topk_idx`` count in a group with absent ranks.

It is decided before the plan, for all backends alike, so they need not know which rows never come.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jax_ep._core import arguments
from jax_ep._core.types import DropPolicy
from jax_ep._groups.group import Group


def before_plan(
    op: str,
    topk_idx: Int32[Array, "tokens top_k"],
    drop_policy: DropPolicy,
    *,
    group: Group,
    num_experts: int,
) -> Int32[Array, "tokens top_k"]:
    """−1 for entries that go to an absent rank's expert or come from an absent rank's token."""
    if not group.absent_ranks:
        return topk_idx
    if group.backend == "cuda" and drop_policy == "score":
        raise arguments.value_error(
            op,
            "drop_policy",
            "'position' on GPUs in a group with absent ranks",
            repr(drop_policy),
            "leave it out: the other policy adds up counts of all ranks",
        )
    absent = np.array(group.absent_ranks, np.int32)
    homes = topk_idx // (num_experts // group.size)
    here = lax.axis_index(group.axis_names)
    is_absent = (homes[..., None] == absent).any(axis=-1) | (here == absent).any()
    return jnp.where(is_absent, -1, topk_idx)
