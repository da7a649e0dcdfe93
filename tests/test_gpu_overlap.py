"""Ops in flight on GPUs: the same bits as ops in line, over many steps, with two at once.

And kernels that leave them SMs, which give the same bits on any number of SMs.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import chunks_in_line
import jax_ep
import oracle
import routings
from jax_ep import _compat
from jax_ep._groups import gpu_side, tuning
from jax_ep.bench import latency_arms, latency_beside, trace
from jax_ep.bench.cases import Case
from jax_ep.bench.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.one_process("drives all GPUs from one process"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

RANKS = min(jax.device_count(), 2)  # ops run with one rank too, and then wait for nobody
TOKENS, TOP_K, EXPERTS, HIDDEN = 256, 4, 16, 1024
STEPS = 1000

# XLA's autotuner chooses algorithms of matmuls by their times, for each program anew, and so may give
# equal matmuls of two programs other bits. With these, cuBLAS chooses by shape. Compiled without a GPU
# (jaxlib 0.11.2), layers in flight and in line then have the same dense matmuls: shapes, epilogues and
# algorithms.
BY_SHAPE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
needs_hopper = pytest.mark.skipif(not _compat.targets_hopper(), reason="needs a Hopper GPU")


def make_group(**options) -> jax_ep.Group:
    """A group that may have two ops in flight at once."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:RANKS]), ("expert",))
    return jax_ep.create_group(mesh, "expert", backend="cuda", channels=2, **options)


def collective(group: jax_ep.Group) -> jax.Array:
    """Zero, from a collective of XLA's own, without which it hides nothing (jaxlib 0.11.2).

    Layers over several ranks have some. XLA drops sums over one rank, but not a permutation of one.
    """

    def permuted() -> jax.Array:
        zero = (lax.axis_index("expert") * 0).astype(jnp.float32)[None]
        return lax.ppermute(zero, "expert", [(i, i) for i in range(RANKS)])

    run = jax.shard_map(permuted, mesh=group.mesh, in_specs=(), out_specs=P("expert"))
    return run().sum()


def make_data(dtype=jnp.bfloat16):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((2, RANKS * TOKENS, HIDDEN)), dtype)
    idx = routings.zipf(rng, RANKS, 2 * TOKENS, TOP_K, EXPERTS).reshape(2, -1, TOP_K)
    weights = jnp.asarray(rng.random(idx.shape), jnp.float32)
    matrix = jnp.asarray(rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5, dtype)
    return x, jnp.asarray(idx), weights, matrix


def on_ranks(group, function):
    specs = (P(None, "expert"), P(None, "expert"), P(None, "expert"), P())
    return jax.jit(
        jax.shard_map(
            function, mesh=group.mesh, in_specs=specs, out_specs=P(None, "expert"), check_vma=False
        )
    )


def two_in_flight(group, x, idx, weights, matrix):
    """Both halves dispatched at once, on two channels, beside a matmul; then both combined at once."""
    options = {"group": group, "num_experts": EXPERTS}
    starts = [jax_ep.dispatch_start(x[i], idx[i], weights[i], **options) for i in range(2)]
    beside = jnp.tanh(x[0] @ matrix)
    outs = [jax_ep.dispatch_done(ticket) for ticket in starts]
    rows = [(jnp.tanh(o.tokens) * o.weights[:, None]).astype(x.dtype) for o in outs]
    homes = [
        jax_ep.combine_start(r, o.handle, group=group) for r, o in zip(rows, outs, strict=True)
    ]
    ys = jnp.stack([jax_ep.combine_done(ticket) for ticket in homes])
    return ys, beside, sum(o.num_dropped.sum() for o in outs)


def in_line(group, x, idx, weights, matrix):
    """The same, one op after the other."""
    ys = []
    for i in range(2):
        out = jax_ep.dispatch(x[i], idx[i], weights[i], group=group, num_experts=EXPERTS)
        rows = (jnp.tanh(out.tokens) * out.weights[:, None]).astype(x.dtype)
        ys.append(jax_ep.combine(rows, out.handle, group=group))
    return jnp.stack(ys), jnp.tanh(x[0] @ matrix), jnp.int32(0)


def steps(step, group, length, x, idx, weights, matrix):
    """``length`` steps of changing routes, each on what the one before gave."""

    def turn(x, i):
        shifted = jnp.where(idx >= 0, (idx + i) % EXPERTS, idx)
        ys, beside, dropped = step(group, x, shifted, weights, matrix)
        total = jax.lax.psum(dropped, "expert")  # also a collective of XLA's own beside the ops
        x = ys + jnp.stack([beside, x[1]]) + total.astype(x.dtype)
        return (x / (1 + jnp.abs(x).max())).astype(x.dtype), None

    return jax.lax.scan(turn, x, jnp.arange(length))[0]


def test_many_steps_with_two_ops_in_flight():
    group, data = make_group(), make_data()
    found = on_ranks(group, functools.partial(steps, two_in_flight, group, STEPS))
    wanted = on_ranks(group, functools.partial(steps, in_line, group, STEPS))
    want = np.asarray(wanted(*data))
    assert np.isfinite(want.astype(np.float32)).all() and np.abs(want.astype(np.float32)).max() > 0
    for _ in range(10_000 // STEPS):
        oracle.assert_same(np.asarray(found(*data)), want, "x")
    group.check()


def test_regions_are_compiled_and_counted():
    """The program has pairs of start and done, and every op of them ran."""
    group, data = make_group(timeout=500), make_data()
    program = on_ranks(group, functools.partial(steps, two_in_flight, group, 10))
    text = program.lower(*data).compile().as_text()
    for op in "dispatch", "combine":
        assert text.count(f'custom_call_target="jax_ep_{op}_async"') == 2
    jax.block_until_ready(program(*data))
    counts, error = gpu_side.library().completed_ops(group.id)
    assert error is None and set(counts.values()) == {10 * 6}  # two plans, dispatches, combines


@pytest.mark.parametrize("overlap", ["chunks", "shared_expert"])
def test_layers_give_the_bits_of_layers_in_line(overlap, monkeypatch):
    """Outputs and the gradient of x; with chunks, of the weights up to rounding.

    Of the same chunks with no op in flight, the weights' gradients are the same bits too.
    """
    group = make_group()
    params = jax_ep.init_moe_params(
        jax.random.key(0),
        hidden=HIDDEN,
        intermediate=512,
        num_experts=EXPERTS,
        shared_intermediate=512,
        dtype=jnp.bfloat16,
    )
    (x, _), *_ = make_data()

    def compiled(**options):
        def loss(x, params):
            y, aux = jax_ep.moe(x, params, group=group, num_experts=EXPERTS, top_k=TOP_K, **options)
            return jnp.sin(y.astype(jnp.float32)).sum() + aux.aux_loss, (y, aux)

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(value_and_grad, compiler_options=BY_SHAPE).lower(x, params).compile()

    (_, (y, aux)), (dx, d_params) = compiled()(x, params)
    overlapped = compiled(overlap=overlap)
    for _ in range(20):
        (_, (got_y, got_aux)), (got_dx, got_params) = overlapped(x, params)
        oracle.assert_same(np.asarray(got_y), np.asarray(y), "y")
        oracle.assert_same(np.asarray(got_dx), np.asarray(dx), "dx")
        assert got_aux.aux_loss == aux.aux_loss and (got_aux.load == aux.load).all()
        for got, want in zip(jax.tree.leaves(got_params), jax.tree.leaves(d_params), strict=True):
            got, want = (np.asarray(a, np.float32) for a in (got, want))
            assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)
    if overlap == "chunks":
        order = chunks_in_line.replace_starts(monkeypatch)
        found, (_, of_chunks) = compiled(overlap=overlap)(x, params)
        jax.clear_caches()
        assert order[:4] == ["dispatch", "dispatch", "combine", "combine"]
        oracle.assert_same(np.asarray(found[1][0]), np.asarray(y), "y")
        for got, want in zip(jax.tree.leaves(got_params), jax.tree.leaves(of_chunks), strict=True):
            oracle.assert_same(np.asarray(got), np.asarray(want), "gradient of weights")
    group.check()


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_no_sm_is_held_between_the_calls_of_latency_mode(op):
    """A matmul with a block on every SM takes no longer there, also while a peer is late."""
    session = Session(ranks=RANKS, gpus=RANKS, repeat=20, command="")
    case = Case(
        op="overlap",
        mode="latency",
        layout="token",
        tokens=128,
        intermediate=2304,
        name=latency_arms.BETWEEN + op,
    )
    names = [latency_arms.BETWEEN + op, *([op + latency_arms.LATE] if RANKS > 1 else [])]
    for name in names:
        record = latency_beside.measure(session, dataclasses.replace(case, name=name))
        assert record["correct"] and record["within_bound"], record


def test_ops_in_flight_are_beside_the_program_in_a_profile(tmp_path: pathlib.Path):
    """They are on another stream than the matmul, with command buffers on."""
    group, data = make_group(), make_data()
    program = on_ranks(group, functools.partial(steps, two_in_flight, group, 10))
    jax.block_until_ready(program(*data))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(program(*data))
    (path,) = tmp_path.rglob("*.xplane.pb")
    lines: dict[str, set[str]] = {"rows": set(), "matmul": set()}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if "Dispatch" in event.name or "Combine" in event.name:
                    lines["rows"].add(line.name)
                elif "gemm" in event.name.lower() or "nvjet" in event.name.lower():
                    lines["matmul"].add(line.name)
    assert lines["rows"] and lines["matmul"], lines
    assert not lines["rows"] & lines["matmul"], lines


@needs_hopper
def test_grouped_dot_gives_the_same_bits_on_any_number_of_sms():
    """Forward and both gradients: on one SM, on those that an op leaves, and on all."""
    rng = np.random.default_rng(3)
    sizes = jnp.array([100, 0, 700, 1], jnp.int32)
    given = [
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((1000, 256), (4, 256, 256), (1000, 256))
    ]

    def run(num_sms, lhs, rhs, d_out):
        def product(lhs, rhs):
            return jax_ep.grouped_dot(lhs, rhs, sizes, num_sms=num_sms)

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(d_out)

    wants = jax.jit(functools.partial(run, None))(*given)
    assert all(np.abs(np.asarray(want, np.float32)).max() > 0 for want in wants)
    for num_sms in 1, 108:
        gots = jax.jit(functools.partial(run, num_sms))(*given)
        for got, want, name in zip(gots, wants, ("out", "d_lhs", "d_rhs"), strict=True):
            oracle.assert_same(np.asarray(got), np.asarray(want), f"{name} on {num_sms} SMs")


@needs_hopper
def test_experts_run_beside_the_op_that_they_leave_sms(tmp_path: pathlib.Path):
    """In time: each kernel with fewer blocks than SMs runs while an op does, on another stream.

    Kernels that took all SMs would not be such kernels, and would run before or after the op.
    """
    steps, tokens, hidden = 5, 8192, 2048
    group = make_group()
    all_sms = _compat.num_multiprocessors()
    blocks = all_sms - tuning.default_num_sms("token", all_sms)
    params = jax_ep.init_moe_params(
        jax.random.key(0),
        hidden=hidden,
        intermediate=hidden,
        num_experts=EXPERTS,
        dtype=jnp.bfloat16,
    )
    x = jax.random.normal(jax.random.key(1), (RANKS * tokens, hidden), jnp.bfloat16)

    def loss(x, params):
        options = {"group": group, "num_experts": EXPERTS, "top_k": TOP_K, "overlap": "chunks"}
        y, aux = jax_ep.moe(x, params, **options)
        return jnp.sin(y.astype(jnp.float32)).sum() + aux.aux_loss + collective(group)

    # With the value, of which the collective is a part.
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=trace.WITHOUT_GRAPHS)
    jax.block_until_ready(step(x, params))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(steps):
            jax.block_until_ready(step(x, params))
    group.check()
    of_gpus = [events for events in trace.kernels_of(tmp_path).values() if events]
    assert len(of_gpus) == RANKS
    for events in of_gpus:
        ops = [event for event in events if event.is_op]
        leaving = [event for event in events if event.blocks == blocks and not event.is_op]
        # One beside each of four ops: two in each pass.
        assert len(ops) >= 8 * steps and len(leaving) == 4 * steps, sorted(
            {(event.name[:40], event.blocks) for event in events}
        )
        beside = [event for event in leaving if any(event.overlaps(op) for op in ops)]
        assert len(beside) >= 0.75 * len(leaving), (leaving, ops)
        assert not {event.line for event in beside} & {op.line for op in ops}
