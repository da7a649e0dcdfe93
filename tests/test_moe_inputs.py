"""Wrong inputs of ``jax_ep.moe``: options that are not static values, arrays on other devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K, S = 8, 12, 4, 2, 6
NAMES = ("data", "expert")


def make_params() -> jax_ep.MoEParams:
    sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": S}
    return jax_ep.init_moe_params(jax.random.key(0), **sizes)


def make_x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (8, H))


def layer_of(group: jax_ep.Group):
    return functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K)


def with_shared(**weights):
    params = make_params()
    return {"params": params._replace(shared=params.shared._replace(**weights))}


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *args):
        raise AssertionError("not called")


V, T = ValueError, TypeError


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"capacity": jnp.int32(8)},
            V,
            r"capacity: expected a Python int, .*, got Array\(8",
        ),
        ({"capacity": np.int64(8)}, V, r"capacity: expected a Python int, .*, got np.int64\(8\); "),
        (
            {"capacity_factor": jnp.float32(1)},
            V,
            r"capacity_factor: .* int or float, .*got Array\(",
        ),
        (
            {"capacity_factor": np.float32(1)},
            V,
            r"capacity_factor: .* int or float, .*got np.float32",
        ),
        ({"alignment": jnp.int32(8)}, V, r"alignment: expected a positive int .*, got Array\("),
        ({"quantization": ["fp8"]}, V, r"quantization: expected one of None, 'fp8', got \['fp8'\]"),
        ({"scale_format": ["f32"]}, V, r"scale_format: expected 'f32' or 'ue8m0', got \['f32'\]"),
        ({"config": {"num_sms": 3}}, T, "config: expected a DispatchConfig or None, got dict"),
        ({"router": Unhashable()}, T, "router: .* that can be hashed, got one of type Unhashable"),
        ({"grouped_dot": Unhashable()}, T, "grouped_dot: .* hashed, .* Unhashable .*__hash__"),
        ({"activation": Unhashable()}, T, "activation: .* hashed, .* Unhashable .*__hash__"),
        ({"activation": "silu"}, T, "activation: expected a function, got str; leave it out"),
        ({"router": lambda logits, bias: (logits, logits)}, T, "router: .*Routing, .*gives tuple"),
        ({"token_axes": "expert"}, T, r"token_axes: expected a tuple .*, got 'expert'; wrap it"),
        ({"token_axes": 3}, T, r"token_axes: expected a tuple .*, got 3; wrap it"),
        (
            {"params": make_params()._replace(shared=(1, 2, 3))},
            T,
            "params.shared: expected jax_ep.SharedExpert or None, got tuple; ",
        ),
        (with_shared(up=None), T, "params.shared.up: expected an array, got NoneType; "),
        (
            with_shared(down=jnp.zeros((H, S))),
            V,
            r"params.shared.down: expected shape \(6, 8\) .*, got \(8, 6\); ",
        ),
        (with_shared(gate=jnp.zeros(())), V, r"params.shared.gate: expected shape \(8, 6\) "),
    ],
)
def test_wrong_arguments(arguments, error, text):
    group = spmd.make_group(2, "reference")
    call = {"x": make_x(), "params": make_params()} | arguments
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        layer_of(group)(**call)


def test_traced_capacity():
    layer = layer_of(spmd.make_group(2, "reference"))
    with pytest.raises(
        ValueError, match=r"jax_ep.moe: argument capacity: expected a Python int, .*, got"
    ):
        jax.jit(lambda c: layer(make_x(), make_params(), capacity=c)[0])(8)


def meshes(sizes: tuple[int, ...], other: tuple[int, ...]) -> tuple[Mesh, Mesh]:
    """Two meshes of the same devices."""
    names = ("data", "expert", "model")
    return tuple(spmd.make_mesh(each, names[: len(each)], AxisType.Auto) for each in (sizes, other))


@pytest.mark.parametrize("argument", ["x", "params", "mask"])
def test_arrays_on_a_mesh_of_another_shape(argument):
    """XLA would end the process if the axes of two meshes divide the same devices differently."""
    mine, other = meshes((2, 4), (4, 2))
    call = {"x": make_x(), "params": make_params(), "mask": jnp.ones((8,), bool)}
    call[argument] = jax.device_put(call[argument], NamedSharding(other, P()))
    text = (
        rf"jax_ep.moe: argument {argument}.*: expected an array on the mesh of the group, "
        r"{'data': 2, 'expert': 4}, got one on a mesh {'data': 4, 'expert': 2} of the same dev"
    )
    with pytest.raises(ValueError, match=text):
        layer_of(jax_ep.create_group(mine, "expert"))(**call)


@pytest.mark.parametrize("other", [(8,), (2, 2, 2)])
def test_arrays_on_a_mesh_that_is_finer_or_coarser(other):
    mine, other = meshes((2, 4), other)
    layer = layer_of(jax_ep.create_group(mine, "expert"))
    want, _ = layer(make_x(), make_params())
    y, _ = layer(jax.device_put(make_x(), NamedSharding(other, P("data"))), make_params())
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_arrays_on_other_devices():
    mesh = spmd.make_mesh(2)
    layer = layer_of(jax_ep.create_group(mesh, "expert", backend="reference"))
    alone = jax.device_put(make_x(), jax.devices()[1])
    with pytest.raises(ValueError, match=r"x: expected an array .*, got one on 1 device\(s\), 1;"):
        layer(alone, make_params())
    turned = NamedSharding(Mesh(mesh.devices[::-1], mesh.axis_names), P())
    with pytest.raises(ValueError, match=r"x: .*got one on a mesh {'expert': 2} of devices 1, 0;"):
        layer(jax.device_put(make_x(), turned), make_params())
    want, _ = layer(make_x(), make_params())
    there, _ = layer(jax.device_put(make_x(), NamedSharding(mesh, P("expert"))), make_params())
    np.testing.assert_array_equal(there, want)


def test_another_mesh_is_set():
    group = spmd.make_group(2, "reference")
    names = ("data", "expert")
    with (
        jax.set_mesh(spmd.make_mesh(spmd.fit((2, 2), names), names)),
        pytest.raises(ValueError, match=r"argument group: .*{'data'.*got .*{'expert': 2}; make"),
    ):
        layer_of(group)(make_x(), make_params())


def test_masked_tokens_reach_no_gradient(native_backend):
    """The contents of padding, even NaN, have no effect."""
    layer = layer_of(spmd.make_group(2, native_backend))
    params = make_params()
    mask = jnp.arange(8) != 3

    def gradients(x):
        def loss(params, x):
            y, aux = layer(x, params, mask=mask)
            return jnp.sum(jnp.where(mask[:, None], y, 0) ** 2) + aux.aux_loss

        return jax.grad(loss, argnums=(0, 1))(params, x)

    want = gradients(make_x())
    found = gradients(make_x().at[3].set(jnp.nan))
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
