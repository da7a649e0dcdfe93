"""Groups of an ``AbstractMesh``: programs are traced and lowered for devices that are not there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._core import libraries
from small_layer import layer
from spmd import fit, make_mesh

pytestmark = pytest.mark.one_process("lowers programs, and runs none")

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def abstract(shape, names, kind=AxisType.Auto, device=None) -> AbstractMesh:
    return AbstractMesh(shape, names, (kind,) * len(names), abstract_device=device)


def step(group, x, weights, idx):
    loss = lambda x, w: jnp.sin(layer(group, x, w, idx, num_experts=4)).sum()  # noqa: E731
    return jax.grad(loss, (0, 1))(x, weights)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_text_is_that_of_real_devices(backend):
    mesh = make_mesh(fit((2,), ("expert",)))
    texts = []
    for each in (mesh, abstract(mesh.devices.shape, mesh.axis_names, mesh.axis_types[0])):
        group = jax_ep.create_group(each, "expert", backend=backend)
        assert group is jax_ep.create_group(each, "expert", backend=backend)
        sharded = NamedSharding(each, P("expert"))
        shapes = ((8, 16), jnp.float32), ((8, 2), jnp.float32), ((8, 2), jnp.int32)
        given = [jax.ShapeDtypeStruct(*shape, sharding=sharded) for shape in shapes]
        specs = {"in_specs": P("expert"), "out_specs": P("expert")}
        run = jax.shard_map(functools.partial(step, group), mesh=each, **specs)
        texts.append(jax.jit(run).trace(*given).lower(lowering_platforms=("cpu",)).as_text())
    assert texts[0] == texts[1]
    assert ("jax_ep_combine_vjp" in texts[0]) == (backend == "cpu")


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_a_training_step_for_256_gpus(backend):
    """The layer, with 32 groups of 8 ranks side by side."""
    if backend == "cuda" and (why := libraries.why_unavailable("cuda", compile_only=True)):
        pytest.skip(why)
    mesh = abstract((32, 8), ("data", "expert"), device=H200)
    group = jax_ep.create_group(mesh, "expert", backend=backend)
    assert group.size == 8 and group.device.core_count == 132
    sizes = {"hidden": 256, "intermediate": 128, "num_experts": 64}

    def train(x, params):
        def loss(params):
            y, aux = jax_ep.moe(x, params, group=group, num_experts=64, top_k=8)
            return jnp.square(y.astype(jnp.float32)).mean() + aux.aux_loss

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    shapes = jax.eval_shape(lambda: jax_ep.init_moe_params(jax.random.key(0), **sizes))
    specs = jax_ep.moe_partition_specs(shapes, group=group)

    def place(a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(place, shapes, specs)
    x = place(jax.ShapeDtypeStruct((256, 16, 256), jnp.bfloat16), P(("data", "expert")))
    text = jax.jit(train).trace(x, params).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jax_ep_dispatch" in text) == (backend == "cuda")
    assert "num_partitions = 256" in text


def test_errors():
    mesh = abstract((2,), ("expert",))
    with pytest.raises(ValueError, match=r"create_group: argument mesh: .*abstract_device"):
        jax_ep.create_group(mesh)
    of_cpus = abstract((2,), ("expert",), device=AbstractDevice("cpu", None, "cpu"))
    with pytest.raises(ValueError, match=r"backend: .*platform 'cpu'"):
        jax_ep.create_group(of_cpus, backend="cuda")
    group = jax_ep.create_group(mesh, backend="reference")
    sizes = {"hidden": 8, "intermediate": 8, "num_experts": 4}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes)
    x = jax.device_put(jnp.ones((4, 8)), jax.devices()[0])
    with pytest.raises(ValueError, match=r"moe: argument x: .*the mesh of the group is abstract"):
        jax_ep.moe(x, params, group=group, num_experts=4, top_k=2)
