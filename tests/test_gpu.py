"""What only GPUs can show: graph replay, failures of kernels that wait, groups made anew."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import routings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.one_process("drives two GPUs from one process"),
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs"
    ),
]

RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN = 2, 64, 4, 16, 256


def make_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:RANKS]), ("expert",))


def make_data(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((RANKS * TOKENS, HIDDEN)).astype(np.float32)
    idx = routings.zipf(rng, RANKS, TOKENS, TOP_K, EXPERTS).reshape(-1, TOP_K)
    weights = rng.random(idx.shape).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(idx), jnp.asarray(weights)


def layer(group: jax_ep.Group, layout: str = "expert"):
    """Dispatch, something that depends on the row, combine."""

    def run(x, idx, weights):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, layout=layout, alignment=8
        )
        rows = jnp.where(out.tokens > 0, out.tokens, out.tokens * 0.5)
        return jax_ep.combine(rows, out.handle, group=group)

    return jax.shard_map(run, mesh=group.mesh, in_specs=(P("expert"),) * 3, out_specs=P("expert"))


def test_a_wrong_call_of_a_native_target_is_an_error():
    """Its text is made in a process that has XLA's plugin for GPUs too."""
    group = jax_ep.create_group(make_mesh(), backend="cuda")
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in [
            (4, 2),
            (4, 2),
            (8, 2),
            (16,),
            (0, 2),
            *3 * [(8,)],
            *2 * [(1,)],
            (4096,),
            (1,),
        ]
    ]
    integers = {"num_ranks": RANKS, "num_experts": EXPERTS, "layout": 0}
    integers |= {
        "num_sms": 0,
        "channel": 0,
        "ordinal": 0,
        "alignment": 8,
        "expert_capacity": 64,
        "masked": 0,
    }
    attributes = {name: np.int32(value) for name, value in integers.items()}
    attributes |= {"group_id": np.int64(group.id), "timeout_ms": np.int64(1000)}

    def run(idx):
        none = jnp.zeros((1,), jnp.int32)
        coords = jnp.stack([jax.lax.axis_index("expert"), 0])
        return jax.ffi.ffi_call("jax_ep_plan", shapes)(idx, coords, none, **attributes)

    program = jax.shard_map(
        run, mesh=group.mesh, in_specs=P(), out_specs=P("expert"), check_vma=False
    )
    wanted = r"jax_ep.plan: argument topk_idx: expected S32\[4,2\], got F32\[4,2\]"
    with pytest.raises(jax.errors.JaxRuntimeError, match=wanted):
        jax.block_until_ready(jax.jit(program)(jnp.zeros((4, 2), jnp.float32)))


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_replayed_steps_with_changing_routes(layout):
    """Many steps of one program, two groups interleaved, under scan: each as the reference's."""
    mesh = make_mesh()
    first = jax_ep.create_group(mesh, backend="cuda")
    second = jax_ep.create_group(mesh, backend="cuda", timeout=500)
    assert first.id != second.id

    def steps(groups, x, idx, weights):
        def step(x, i):
            shifted = jnp.where(idx >= 0, (idx + i) % EXPERTS, idx)
            y = layer(groups[0], layout)(x, shifted, weights)
            y = layer(groups[1], layout)(y, idx, weights)
            return y / (1 + jnp.abs(y).max()), None

        return jax.lax.scan(step, x, jnp.arange(20))[0]

    reference = jax_ep.create_group(mesh, backend="reference")
    native = jax.jit(functools.partial(steps, (first, second)))
    expected = jax.jit(functools.partial(steps, (reference, reference)))
    for seed in range(25):
        data = make_data(seed)
        np.testing.assert_allclose(native(*data), expected(*data), rtol=1e-5, atol=1e-6)
    first.check()
    second.check()


def test_rank_that_never_arrives():
    """The others get an error within the deadline, and a new group works."""
    mesh = make_mesh()
    group = jax_ep.create_group(mesh, backend="cuda", timeout=1.5)
    data = make_data(0)

    def divergent(x, idx, weights):
        run = functools.partial(
            lambda x, idx, weights: jax_ep.combine(
                (out := jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS)).tokens,
                out.handle,
                group=group,
            )
        )
        is_first = jax.lax.axis_index("expert") == 0
        return jax.lax.cond(is_first, run, lambda x, idx, weights: x, x, idx, weights)

    program = jax.jit(
        jax.shard_map(
            divergent,
            mesh=mesh,
            in_specs=(P("expert"),) * 3,
            out_specs=P("expert"),
            check_vma=False,
        )
    )

    def run_and_check():
        # A running kernel reports nothing to XLA, so the call may end without an error, with
        # poison.
        with jax_ep.errors():
            jax.block_until_ready(program(*data))
        group.check()

    with pytest.raises(
        jax_ep.CommunicationError, match=r"rank 0, op (plan|dispatch), phase arrival: waited 1"
    ):
        run_and_check()
    again = jax_ep.create_group(mesh, backend="cuda", timeout=1.5)
    assert again is not group
    y = jax.jit(layer(again))(*data)
    reference = jax_ep.create_group(mesh, backend="reference")
    np.testing.assert_allclose(y, jax.jit(layer(reference))(*data), rtol=1e-5, atol=1e-6)
    again.check()
