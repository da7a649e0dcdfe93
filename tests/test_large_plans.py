"""Plans of many tokens, which have their own kernel on GPUs, repeatedly under scan."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collective_steps
from jax_ep import _cpu
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


@pytest.mark.skipif(not _cpu.build_info()["with_cuda"], reason="needs the GPU library")
@pytest.mark.parametrize("layout", [0, 1])
def test_the_kernel_is_another_one(layout):
    """Only the kernel of the plan that reads its peers' memory has scratch."""
    from jax_ep import _cuda

    experts, ranks = collective_steps.EXPERTS, collective_steps.RANKS
    for tokens, with_scratch in ((SIZES.tokens, True), (4096, False)):
        size = _cuda.plan_scratch_size(layout, tokens, collective_steps.TOP_K, experts, ranks)
        assert (size > 0) == with_scratch
