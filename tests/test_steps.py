"""Thousands of steps of one program, each compared on the device with its exact result.

The right values are known without communication: with identity experts, a token comes home as
itself times the sum of the weights of its valid entries. Data are small integers and weights are
powers of two, so every sum is exact in any order. On GPUs the steps are replays of CUDA graphs. On
CPU there are few steps, which test the test.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import lockstep
import logical_hosts
from spmd import (
    create_group,
    fetch,
    here,
    make_group,
    make_mesh,
    need_part,
    put,
    ranks_at_most,
    run_python,
    shard,
    stacked_jit,
)

ON_GPU = jax.default_backend() == "gpu"
RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(8 if ON_GPU else 4), 24, 4, 64
EXPERTS = 4 * RANKS
# Steps under one scan, and runs of that program; steps of a program of one step.
SCANNED, SCANS, SINGLE = (1000, 5, 5000) if ON_GPU else (12, 2, 6)
if lockstep.SHARED_GPUS and "JAX_EP_TEST_ALL_STEPS" not in os.environ:  # they run slower
    # Between hosts one program is compiled, and all of its steps run at once.
    SCANNED, SCANS, SINGLE = (1000, 1, 0) if logical_hosts.PROCESSES else (250, 4, 1000)
WHAT = ("y of the first group", "dx", "d(weights)", "y of the second group", "counts")
needs_gpus = pytest.mark.skipif(not ON_GPU, reason="needs two GPUs")


def stamp(i, rank, salt: int):
    """``[T, H]`` integers from 1 to 61 that tell step, rank, token and channel apart."""
    token, channel = jnp.arange(TOKENS)[:, None], jnp.arange(HIDDEN)
    return ((i * 17 + rank * 29 + token * 5 + channel * 3 + salt) % 61 + 1).astype(jnp.float32)


def routes(i, rank):
    """``[T, K]`` experts of step i: K different ones, some masked; in every fourth the same for all."""
    token, k = jnp.arange(TOKENS)[:, None], jnp.arange(TOP_K)
    spread = (token * 7 + rank * 3 + i * (1 + token % 3) + k * 3) % EXPERTS
    idx = jnp.where(i % 4 == 3, (i + k) % EXPERTS, spread)
    masked = (token + 2 * k + i) % 5 == 0
    return jnp.where(masked & (i % 3 != 0), -1, idx).astype(jnp.int32)


def one_step(groups: tuple[jax_ep.Group, jax_ep.Group], i):
    """``[5]`` numbers of wrong entries of step ``i``, see ``WHAT``."""
    rank = jax.lax.axis_index("expert")
    x, dy, idx = stamp(i, rank, 0), stamp(i, rank, 7) - 30, routes(i, rank)
    weights = 2.0 ** -(1 + (jnp.arange(TOP_K) + jnp.arange(TOKENS)[:, None] + i) % 4)
    used = idx >= 0
    factor = jnp.where(used, weights, 0).sum(axis=1, keepdims=True)

    @jax.checkpoint
    def fused(x, weights):
        out = jax_ep.dispatch(x, idx, weights, group=groups[0], num_experts=EXPERTS, alignment=8)
        y = jax_ep.combine(out.tokens, out.handle, group=groups[0], weights=out.weights)
        return y, (out.counts.sum(), out.num_dropped.sum())

    y, pull, (kept, dropped) = jax.vjp(fused, x, weights, has_aux=True)
    dx, dw = pull(dy)
    out = jax_ep.dispatch(x, idx, weights, group=groups[1], num_experts=EXPERTS, layout="token")
    rows = out.tokens * out.weights.sum(axis=1, keepdims=True)
    again = jax_ep.combine(rows, out.handle, group=groups[1])
    want_dw = jnp.where(used, (x * dy).sum(axis=1, keepdims=True), 0)
    # What all ranks send here, computed without communication.
    everyone = jnp.stack([routes(i, r) for r in range(RANKS)])
    local = EXPERTS // RANKS
    want_kept = ((everyone >= 0) & (everyone // local == rank)).sum()
    differences = (y != x * factor, dx != dy * factor, dw != want_dw, again != x * factor)
    counts = (kept != want_kept).astype(jnp.int32) + dropped
    return jnp.stack([*(d.sum(dtype=jnp.int32) for d in differences), counts])


def programs(groups: tuple[jax_ep.Group, jax_ep.Group]):
    """Add the wrong entries of ``SCANNED`` steps from ``start`` on, and those of one, to ``wrong``."""

    def scanned(wrong, start):
        def body(wrong, i):
            return wrong + one_step(groups, i), None

        return jax.lax.scan(body, wrong, start[0] + jnp.arange(SCANNED))[0]

    def single(wrong, start):
        return wrong + one_step(groups, start[0])

    return [jax.jit(shard(fn, groups[0].mesh)) for fn in (scanned, single)]


def run_all(groups: tuple[jax_ep.Group, jax_ep.Group]) -> np.ndarray:
    """``[R, 5]`` wrong entries of all steps."""
    mesh = groups[0].mesh
    scanned, single = programs(groups)
    wrong = put(np.zeros(RANKS * len(WHAT), np.int32), mesh)
    starts = [put(np.full(RANKS, SCANNED * n, np.int32), mesh) for n in range(SCANS)]
    for start in starts:
        wrong = scanned(wrong, start)
    for n in range(SINGLE):
        wrong = single(wrong, put(np.full(RANKS, SCANNED * SCANS + n, np.int32), mesh))
        if n % 50 == 49:  # else thousands of programs would be in flight
            jax.block_until_ready(wrong)
    return fetch(wrong, mesh).reshape(RANKS, len(WHAT))


def test_every_step_is_right(backend):
    """Two groups in turn, new routes in every step, under scan and checkpoint; forward and backward."""
    mesh = make_mesh(RANKS)
    need_part(mesh)
    groups = (make_group(RANKS, backend), create_group(mesh, backend=backend, timeout=50))
    assert groups[0].id != groups[1].id
    wrong = run_all(groups)
    assert not wrong.any(), {what: wrong[:, n].tolist() for n, what in enumerate(WHAT)}
    for group in groups:
        group.check()


def test_wrong_steps_are_counted(backend, monkeypatch):
    """The test above can fail: with another x expected, all entries of y are wrong."""
    need_part(make_mesh(RANKS))
    group = make_group(RANKS, backend)
    real = jax_ep.dispatch
    monkeypatch.setattr(jax_ep, "dispatch", lambda x, *args, **kw: real(x + 1, *args, **kw))
    count = stacked_jit(lambda i: one_step((group, group), i[0]), group.mesh)
    wrong = count(np.zeros((RANKS, 1), np.int32)).reshape(RANKS, len(WHAT))
    routed = np.asarray([(routes(0, rank) >= 0).any(axis=1).sum() for rank in range(RANKS)])
    np.testing.assert_array_equal(wrong[:, 0], routed * HIDDEN)
    assert not wrong[:, 1].any() and wrong[:, 2].any() and not wrong[:, 4].any()


@pytest.mark.gpu
@pytest.mark.gpu2
@pytest.mark.slow
@needs_gpus
@pytest.mark.one_process("starts one; set XLA_FLAGS for all processes of the launcher instead")
def test_without_command_buffers():
    """The same with every kernel launched by itself."""
    file, config = pathlib.Path(__file__), pathlib.Path(__file__).parents[1] / "pyproject.toml"
    done = run_python(
        # pytest-benchmark would warn about xdist, whose worker may run this test.
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-c", str(config)),
        f"{file}::test_every_step_is_right",
        timeout=500,
        XLA_FLAGS="--xla_gpu_enable_command_buffer=",
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr


@pytest.mark.gpu
@pytest.mark.gpu2
@needs_gpus
def test_ranks_at_different_ops():
    """Rank 0 dispatches while the others combine: an error on all ranks; then a new group works."""
    mesh = make_mesh(RANKS)
    need_part(mesh)
    group = create_group(mesh, backend="cuda", timeout=5)

    def program(group, apart):
        def run(x, idx):
            out = jax_ep.dispatch(
                x, idx, group=group, num_experts=EXPERTS, layout="token", capacity=RANKS * TOKENS
            )
            back = lambda x: jax_ep.combine(out.tokens, out.handle, group=group)  # noqa: E731
            if not apart:
                return back(x)
            again = lambda x: jax_ep.dispatch(x, group=group, handle=out.handle).tokens[:TOKENS]  # noqa: E731
            return jax.lax.cond(jax.lax.axis_index("expert") == 0, again, back, x)

        return jax.jit(shard(run, mesh, check_vma=False))

    x = np.arange(RANKS * TOKENS * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN) % 97
    idx = np.concatenate([np.asarray(routes(0, rank)) for rank in range(RANKS)])
    given = put((x, idx), mesh)
    text = "no error"
    try:
        # A running kernel reports nothing to XLA, so the call may end without an error, with
        # poison.
        with jax_ep.errors():
            jax.block_until_ready(program(group, apart=True)(*given))
        group.check()
    except jax_ep.CommunicationError as error:
        text = str(error)
    texts = [text]
    if lockstep.ACTIVE and here(mesh):
        texts = lockstep.exchange.swap(text, sorted({d.process_index for d in mesh.devices.flat}))
    assert "no error" not in texts, texts
    assert any("is at another op" in text for text in texts), texts
    new = create_group(mesh, backend="cuda", timeout=5)
    assert new is not group
    # In layout "token" a row comes home once from each rank that it went to.
    owner = np.where(idx >= 0, idx // (EXPERTS // RANKS), -1)
    copies = np.array([len(set(row) - {-1}) for row in owner.tolist()], np.float32)
    y = fetch(program(new, apart=False)(*given), mesh)
    np.testing.assert_array_equal(y, x * copies[:, None])
    new.check()
