"""Plans of many tokens, which have their own kernel on GPUs, repeatedly under scan."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collective_steps
from jax_ep import _cpu
from jax_ep._ops import gradients
from jax_ep._ops.options import PlanOptions
from spmd import make_group, need_part, stacked_jit

SIZES = dataclasses.replace(
    collective_steps.SMALL, tokens=70_000, hidden=4, layouts=("expert", "token", "expert")
)
STEPS = 4


def test_steps_of_many_tokens(native_backend):
    """Every row is right; the routes change from step to step."""
    group = make_group(collective_steps.RANKS, native_backend)
    need_part(group.mesh)

    def run(start):
        def step(wrong, i):
            return wrong + jnp.stack(collective_steps.layers(group, SIZES, i)), None

        return jax.lax.scan(step, 0 * start, start[0] + jnp.arange(STEPS))[0]

    found = stacked_jit(run, group.mesh)(np.zeros((collective_steps.RANKS, 2), np.int32))
    np.testing.assert_array_equal(found, 0)


def test_plans_in_a_row(native_backend):
    """Plans alone, with XLA's kernels between them.

    XLA lets its kernels begin before the kernel ahead of them ends, if that one allows it. Where ranks
    share a GPU, many blocks that wait so once kept the plan of the other rank from the SMs.
    """
    tokens, top_k, experts = 4096, 8, 128 * collective_steps.RANKS
    group = make_group(collective_steps.RANKS, native_backend, timeout=20)
    need_part(group.mesh)

    def plan(ids, group):
        options = PlanOptions(
            group=group, num_experts=experts, layout="token", capacity=2 * tokens, alignment=1
        )
        return gradients.plan(options, ids).dest_row

    def in_a_row(ids):
        for _ in range(5):
            rows = plan(ids, group)
            ids = jnp.where(rows == tokens * experts, -1, ids)  # never
        return rows

    rng = np.random.default_rng(0)
    ids = rng.integers(0, experts, (collective_steps.RANKS, tokens, top_k)).astype(np.int32)
    found = stacked_jit(in_a_row, group.mesh)(ids)
    expected = stacked_jit(
        lambda x: plan(x, make_group(collective_steps.RANKS, "reference")), group.mesh
    )(ids)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not _cpu.build_info()["with_cuda"], reason="needs the GPU library")
@pytest.mark.parametrize("layout", [0, 1])
def test_the_kernel_is_another_one(layout):
    """Only the kernel of the plan that reads its peers' memory has scratch."""
    from jax_ep import _cuda

    experts, ranks = collective_steps.EXPERTS, collective_steps.RANKS
    for tokens, with_scratch in ((SIZES.tokens, True), (4096, False)):
        size = _cuda.plan_scratch_size(layout, tokens, collective_steps.TOP_K, experts, ranks)
        assert (size > 0) == with_scratch
