"""What ``jax_ep.moe`` refuses, in a text that names argument, expected, got and fix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_ep
import spmd
from jax_ep import routing

pytestmark = pytest.mark.one_process("calls the layer with arrays of one process")

H, F, E, K = 8, 12, 8, 2


def make_params(hidden: int = H) -> jax_ep.MoEParams:
    sizes = {"hidden": hidden, "intermediate": F, "num_experts": E}
    return jax_ep.init_moe_params(jax.random.key(0), **sizes)


def make_group() -> jax_ep.Group:
    names, axis = ("data", "expert"), "expert"
    sizes = spmd.fit((2, 2), names, axis)
    return spmd.create_group(
        spmd.make_mesh(sizes, names, AxisType.Explicit), axis, backend="reference"
    )


def one_expert(logits, bias):
    """A router that sends each token to one expert, where the layer asks for two."""
    idx = jnp.full((logits.shape[0], 1), 1, jnp.int32)
    return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"token_axes": ("batch", "expert")},
            "token_axes: expected axes of the mesh .'data', 'expe",
        ),
        (
            {"token_axes": ("data",)},
            "token_axes: expected the axes of the group, .'expert',., among",
        ),
        (
            {"overlap": "shared_expert"},
            "overlap: expected None or .chunks. without a shared expert",
        ),
        ({"top_k": 9}, "top_k: expected 1 to 8 experts a token, got 9"),
        ({"num_experts": 7}, "num_experts: expected a positive multiple of the group's 2 ranks"),
        (
            {"num_experts": 16},
            r"params.router_kernel: expected shape \(8, 16\).*jax_ep.init_moe_params",
        ),
        (
            {"router": one_expert},
            r"router: .* topk_weights of shape \[tokens, top_k\] \(\d, 2\)",
        ),
        (
            {"x": jnp.ones((4, 6))},
            "x: expected rows of a positive multiple of 16 bytes, got hidden 6",
        ),
    ],
)
def test_errors(arguments, text):
    group = make_group()
    arguments = {"x": jnp.ones((4, H)), "num_experts": E, "top_k": K} | arguments
    hidden = arguments["x"].shape[1]
    with pytest.raises(ValueError, match=f"jax_ep.moe: argument {text}"):
        jax_ep.moe(params=make_params(hidden=hidden), group=group, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"params": None},
            TypeError,
            "params: expected jax_ep.MoEParams, got NoneType; .*init_moe",
        ),
        (
            {"params": {}},
            TypeError,
            "params: expected jax_ep.MoEParams, got dict; .*init_moe_params",
        ),
        (
            {"params": make_params()._replace(up=None)},
            TypeError,
            "params.up: expected an array, got NoneType; .*init_moe_params",
        ),
        (
            {"params": make_params()._replace(router_bias=[0.0] * E)},
            TypeError,
            "params.router_bias: expected an array or None, got list; ",
        ),
        (
            {"params": make_params()._replace(gate=jnp.zeros(()))},
            ValueError,
            r"params.gate: expected shape \(8, 8, 12\) .*, got \(\); ",
        ),
        ({"router": None}, TypeError, "router: expected 'softmax', .* got NoneType; leave it out"),
        ({"router": 3}, TypeError, "router: expected 'softmax', .* a function, got int; leave"),
        (
            {"router": "best"},
            ValueError,
            "router: expected one of 'softmax', 'sigmoid', got 'best'",
        ),
        ({"x": jnp.float32(1)}, ValueError, r"x: expected .*\[..., hidden\], got a scalar; give"),
        ({"x": 1.0}, TypeError, "x: expected an array, got float; convert"),
        ({"top_k": 2.0}, TypeError, "top_k: expected a Python int, got float; "),
        ({"num_experts": 8.0}, TypeError, "num_experts: expected a Python int .*, got float; "),
        ({"num_experts": 2**31}, ValueError, "num_experts: expected at most 2147483647, got 2147"),
        ({"mask": jnp.ones((4,))}, TypeError, "mask: expected a boolean .*, got float32; .*bool"),
        ({"mask": [True] * 4}, TypeError, "mask: expected a boolean array or None, got list; "),
        ({"mask": np.ones((5,), bool)}, ValueError, r"mask: expected shape \(4,\), .*got \(5,\)"),
    ],
)
def test_wrong_types(arguments, error, text):
    group = make_group()
    call = {"x": jnp.ones((4, H)), "params": make_params(), "num_experts": E, "top_k": K}
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        jax_ep.moe(group=group, **call | arguments)


def test_inside_shard_map_is_an_error():
    group = spmd.make_group(4, "reference")
    layer = functools.partial(jax_ep.moe, params=make_params(), group=group, num_experts=E, top_k=K)
    with pytest.raises(ValueError, match="argument group: expected a call outside shard_map over"):
        spmd.shard(lambda x: layer(x)[0], group.mesh)(jnp.ones((8, H)))
