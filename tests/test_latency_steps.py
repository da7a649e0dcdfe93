"""100,000 steps in latency mode, with other rows and routes in each, compared on the device.

The steps are those of ``support/exact_steps.py``: rows, their sources, sums and counts, where the
routing is another one of seven in each step (all tokens to one rank, silent ranks, no token at all).
So a row that an op takes from another step is a wrong one. On GPUs a step is a replay of a CUDA
graph. On CPU there are few steps, which test the test.
"""

from __future__ import annotations

import jax
import pytest

import exact_steps
import lockstep
from exact_steps import Sizes
from spmd import make_group, ranks_at_most

ON_GPU = jax.default_backend() == "gpu"
RANKS = ranks_at_most(8 if ON_GPU else 2)
# Steps of a run, which is one scan, and runs. Ranks that share a GPU take turns with their kernels.
SCANNED, RUNS = 1000, 100
if lockstep.SHARED_GPUS and RANKS > 2:
    RUNS = 20 if RANKS <= 4 else 8
SIZES = {"tokens": 32, "hidden": 1024, "top_k": 4, "local_experts": 8}
if not ON_GPU:
    SCANNED, RUNS, SIZES = 9, 2, {"tokens": 5, "hidden": 8}

pytestmark = [pytest.mark.gpu, pytest.mark.slow] if ON_GPU else []


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_every_step_is_right(layout, backend):
    sizes = Sizes(**SIZES, layout=layout, mode="latency")
    group = make_group(RANKS, backend, latency_tokens=sizes.tokens, latency_hidden=2 * sizes.hidden)
    wrong = exact_steps.repeated([group], sizes, SCANNED)(0, RUNS)
    group.check()
    assert exact_steps.explain(wrong) == {}
