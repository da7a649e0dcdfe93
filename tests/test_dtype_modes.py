"""JAX's settings of dtypes: strict promotion, and 64-bit types; dtypes stay as the docstrings say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ep
import spmd
from jax_ep import routing

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K = 128, 8, 4, 2
MODES = {
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
}
OPTIONS = {
    "sigmoid": {"router": "sigmoid", "capacity_factor": 1.0, "overlap": "shared_expert"},
    "groups": {"router": routing.Router("group_limited", num_groups=2, top_groups=1, scale=2.0)},
    "fp8": {"quantization": "fp8"},
}


def make_group(backend: str) -> jax_ep.Group:
    return spmd.make_group(2, backend)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer(options, native_backend):
    """Values and gradients are those of the default settings, and so are all dtypes."""
    group = make_group(native_backend)
    sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": 8}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes, router_bias=True)
    x = jax.random.normal(jax.random.key(1), (5, H), jnp.bfloat16)

    def loss(x, params):
        arguments = {"group": group, "num_experts": E, "top_k": K} | OPTIONS[options]
        y, aux = jax_ep.moe(x, params, **arguments)
        return jnp.sum(y.astype(jnp.float32) ** 2) + aux.aux_loss, (y, aux)

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = jax.jit(step)(x, params)
    for mode, setting in MODES.items():
        with setting():
            found = jax.jit(step)(x, params)
        (_, (y, aux)), (dx, _) = found
        assert [leaf.dtype for leaf in aux] == [jnp.float32, jnp.int32, jnp.int32, jnp.int32]
        assert y.dtype == dx.dtype == jnp.bfloat16
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert got.dtype == wanted.dtype
            got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
            np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2, err_msg=mode)


@pytest.mark.parametrize("mode", MODES)
def test_router_bias(mode, native_backend):
    """The bias of the Flax layers is float32 and stays so."""
    group = make_group(native_backend)
    settings = {"num_experts": E, "top_k": K, "group": group, "router_bias": True}
    x = jnp.ones((4, H))
    with MODES[mode]():
        layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
        assert layer.router_bias[...].dtype == jnp.float32
        layer.update_router_bias(jnp.arange(E))
        assert layer.router_bias[...].dtype == jnp.float32
        linen = jax_ep.linen.MoE(H, F, **settings)
        variables = linen.init(jax.random.key(0), x)
        assert variables["router_bias"]["bias"].dtype == jnp.float32
        update = {"method": "update_router_bias", "mutable": ["router_bias"]}
        _, moved = linen.apply(variables, jnp.arange(E), **update)
        assert moved["router_bias"]["bias"].dtype == jnp.float32
