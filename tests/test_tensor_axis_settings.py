"""``tensor_axis`` in specs of weights, in Flax layers, and what is refused."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from dense_experts import dense_layer
from jax_ep import routing
from test_tensor_axis import (
    LAYER,
    E,
    F,
    H,
    K,
    S,
    draw,
    make_group,
    make_params,
    make_x,
    scaled_experts,
)

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]


def test_partition_specs():
    group = make_group("reference")
    specs = jax_ep.moe_partition_specs(make_params(bias=True), group=group, tensor_axis="tensor")
    assert specs.router_kernel == P(None, None) and specs.router_bias == P(None)
    assert specs.gate == specs.up == P("expert", None, "tensor")
    assert specs.down == P("expert", "tensor", None)
    assert specs.gate_bias == specs.up_bias == P("expert", "tensor")
    assert specs.down_bias == P("expert", None)
    assert specs.shared == jax_ep.SharedExpert(
        P(None, "tensor"), P(None, "tensor"), P("tensor", None)
    )
    names = jax_ep.PartitionNames(intermediate=("tensor", "data"))
    how = {"group": group, "names": names, "tensor_axis": "tensor"}
    specs = jax_ep.moe_partition_specs(make_params(), **how)
    assert specs.up == P("expert", None, ("tensor", "data"))


@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_flax_layers(flax, native_backend):
    """Their weights are made split, and their output is that of ``moe``."""
    from flax import linen, nnx

    group, x = make_group(native_backend), make_x(16)
    settings = {"group": group, "shared_intermediate": S, "expert_bias": True} | LAYER
    if flax == "nnx":
        layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
        up, params = layer.up[...], layer.params()
        assert up.addressable_shards[0].data.shape == (E // 2, H, F // 2)
        y, _ = layer(x)
    else:
        layer = jax_ep.linen.MoE(H, F, **settings)
        variables = layer.init(jax.random.key(0), x)
        specs = linen.get_partition_spec(variables)["params"]
        assert specs["up"] == P("expert", None, "tensor")
        assert specs["shared_down"] == P("tensor", None)
        weights = linen.unbox(variables)["params"]
        shared = jax_ep.SharedExpert(*(weights.pop(f"shared_{n}") for n in ("gate", "up", "down")))
        params = jax_ep.MoEParams(**weights, shared=shared)
        y, _ = layer.apply(variables, x)
    want, _ = dense_layer(x, jax.device_get(params), top_k=K)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"tensor_axis": "model"},
            ValueError,
            "tensor_axis: expected an axis of the mesh .*'model'",
        ),
        ({"tensor_axis": "expert"}, ValueError, "tensor_axis: expected an axis that is not one of"),
        (
            {"tensor_axis": ("tensor",)},
            TypeError,
            r"tensor_axis: expected one axis .*\('tensor',\)",
        ),
        (
            {"token_axes": ("tensor", "expert")},
            ValueError,
            "token_axes: expected axes without the tensor_axis, 'tensor', got",
        ),
        (
            {"params": make_params},
            ValueError,
            "params.up: expected inner channels F that are a multiple of the 3 .*got F = 16; pad",
        ),
        (
            {
                "params": lambda: jax_ep.MoEParams(
                    make_params().router_kernel, experts=draw(0, E, H)
                )
            },
            ValueError,
            "expert_specs: expected a spec that names tensor_axis='tensor'",
        ),
    ],
)
def test_errors(arguments, error, text):
    size = 3 if "multiple of the 3" in text else 2
    group = make_group("reference", (2, size), ("expert", "tensor"))
    arguments = LAYER | arguments
    params = arguments.pop("params", make_params)()
    own = {} if params.experts is None else {"experts": scaled_experts}
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        jax_ep.moe(make_x(4), params, group=group, **own, **arguments)


def test_more_errors():
    group = make_group("reference", (2, 3), ("expert", "tensor"))
    params = make_params()
    params = params._replace(gate=None, up=draw(0, E, H, 6), down=draw(0, E, 6, H))
    params = params._replace(shared=params.shared._replace(gate=None))
    with pytest.raises(ValueError, match=r"params.shared.up: expected inner channels S .*S = 8"):
        jax_ep.moe(make_x(4), params, group=group, **LAYER)
    with pytest.raises(
        ValueError, match="moe_partition_specs: argument tensor_axis: expected an ax"
    ):
        jax_ep.moe_partition_specs(params, group=group, tensor_axis="expert")
    with pytest.raises(
        ValueError, match=r"linen.MoE: argument params.up: expected inner channels F"
    ):
        jax_ep.linen.MoE(H, F, group=group, **LAYER).init(jax.random.key(0), make_x(4))
    entered = jax.shard_map(
        lambda x: jax_ep.moe(x, make_params(), group=group, **LAYER)[0],
        mesh=group.mesh,
        in_specs=P("tensor"),
        out_specs=P("tensor"),
        axis_names={"tensor"},
    )
    with pytest.raises(
        ValueError, match=r"tensor_axis: expected no axis that .* \('tensor',\), got"
    ):
        jax.eval_shape(entered, make_x(6))


def test_any_name_and_no_warning(caplog, monkeypatch):
    """The axis is none of the tokens', whatever its name, and nothing says that work is repeated."""
    from jax_ep._moe import token_axes

    monkeypatch.setattr(token_axes, "_warned", set())
    for name in ("tensor", "inner"):
        group = make_group("reference", (2, 2, 2), ("data", "expert", name))
        seen = []

        def router(logits, bias, seen=seen):
            seen.append(len(logits))
            return routing.softmax_top_k(logits, K)

        options = LAYER | {"tensor_axis": name, "router": router}
        run = functools.partial(jax_ep.moe, group=group, **options)
        jax.eval_shape(run, make_x(16), make_params())
        assert seen == [4]
    assert not caplog.messages
