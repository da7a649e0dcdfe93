"""JAX's settings of promotion and 64-bit types, and operands of other dtypes than the usual ones."""

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
    "noise": {
        "router": routing.Router(noise_std=0.5),
        "router_key": jax.random.key(2),
        "sequence_loss": True,
        "return_routing": True,
    },
}


def make_group(backend: str) -> jax_ep.Group:
    return spmd.make_group(2, backend)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer(options, native_backend):
    """Values, gradients and all dtypes are those of the default settings."""
    group = make_group(native_backend)
    sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": 8}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes, router_bias=True)
    x = jax.random.normal(jax.random.key(1), (5, H), jnp.bfloat16)

    def loss(x, params):
        arguments = {"group": group, "num_experts": E, "top_k": K} | OPTIONS[options]
        y, aux = jax_ep.moe(x, params, **arguments)
        losses = aux.aux_loss + aux.z_loss
        if aux.routing is not None:
            again = {"router": "softmax", "router_key": None, "routing": aux.routing}
            y, replayed = jax_ep.moe(x, params, **arguments | again)
            losses += replayed.sequence_loss
        return jnp.sum(y.astype(jnp.float32) ** 2) + losses, (y, aux)

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    compiled = {}

    def run():
        lowered = jax.jit(step).lower(x, params)
        text = lowered.as_text()
        if text not in compiled:  # most settings make the same program
            compiled[text] = lowered.compile()
        return compiled[text](x, params)

    want = run()
    for mode, setting in MODES.items():
        with setting():
            found = run()
        (_, (y, aux)), (dx, _) = found
        assert [leaf.dtype for leaf in aux[:4]] == [jnp.float32, jnp.int32, jnp.int32, jnp.int32]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(aux)} == {"float32", "int32"}
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


def test_layers_without_rank_promotion(backend):
    """Layers with all routers, and their gradients, can be traced: no op mixes array ranks."""
    group = make_group(backend)
    sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": 8}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes, router_bias=True)
    x, mask = jnp.ones((5, H)), jnp.arange(5) < 4

    def layers(x, params):
        common = {"group": group, "num_experts": E, "top_k": K, "mask": mask}
        for router in ("softmax", "sigmoid", OPTIONS["groups"]["router"]):
            y, aux = jax_ep.moe(x, params, router=router, **common)
            bias = routing.update_bias(params.router_bias, aux.load)
            params = params._replace(router_bias=bias)
            x = x + y * aux.aux_loss
        noisy = {"router": routing.Router(noise_std=0.5), "router_key": jax.random.key(0)}
        ask = {"sequence_loss": True, "return_routing": True}
        y, aux = jax_ep.moe(x.astype(jnp.bfloat16), params, **noisy, **ask, **common)
        again, _ = jax_ep.moe(x, params, routing=aux.routing, **ask, **common)
        x = (x + y + again) * (aux.sequence_loss + aux.z_loss)
        return jax_ep.moe(x, params, quantization="fp8", num_used_experts=3, **common)[0].sum()

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(layers, argnums=(0, 1)), x, params)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_ops_without_rank_promotion(layout, backend):
    """The same for the ops."""
    group = make_group(backend)

    def ops(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=E, layout=layout)
        given = out.weights if layout == "expert" else None
        y = jax_ep.combine(out.tokens, out.handle, group=group, weights=given)
        fp8 = jax_ep.dispatch(x, group=group, handle=out.handle, quantization="fp8").tokens
        return (y.sum() + out.weights.sum() + fp8.sum())[None]

    x, idx, weights = jnp.ones((4, H)), jnp.arange(8).reshape(4, 2) % E, jnp.ones((4, 2))
    with jax.numpy_rank_promotion("raise"):
        total = lambda *args: spmd.shard(ops, group.mesh)(*args).sum()  # noqa: E731
        jax.eval_shape(jax.grad(total, argnums=(0, 2)), x, idx, weights)


WEIGHTS = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"])
def test_ids_and_weights_of_other_dtypes(dtype, native_backend):
    """Rows are those of int32 ids; an id that int32 cannot hold is invalid, not another expert."""
    group = make_group(native_backend)
    kind = np.dtype(dtype)
    idx = np.array([[0, 2], [1, 3], [3, 0], [2, 1]] * 2)
    none = 9 if kind.kind == "u" else -1
    idx[3, 1] = none
    given = idx.astype(kind)
    beyond = max(2**32, 100) if kind.itemsize == 8 else 2**31 if dtype == "uint32" else 100
    given[5, 0], idx[5, 0] = beyond, 100
    if dtype == "int64":  # low bits are those of expert 0
        given[7, 0], idx[7, 0] = -(2**32), -2
    x = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=E)
        return out.tokens, out.num_invalid

    call = spmd.mesh_jit(run, group.mesh)
    want = call(x, idx.astype(np.int32))
    with jax.enable_x64(kind.itemsize == 8):
        found = call(x, given)
    for got, wanted in zip(found, want, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert want[1].sum() == 1 + (none == 9) + (dtype == "int64")


def test_weights_of_narrow_dtypes(native_backend):
    """They travel as float32, and each gradient has the dtype that was given."""
    group = make_group(native_backend)
    x = np.arange(8 * 4, dtype=np.float32).reshape(8, 4) / 8
    idx = np.array([[0, 2], [1, 3], [3, 0], [2, 1]] * 2, np.int32)

    def run(weights, x):
        out = jax_ep.dispatch(x, idx_of(x), weights, group=group, num_experts=E)
        rows = jnp.sin(out.tokens)
        y = jax_ep.combine(rows, out.handle, group=group, weights=out.weights.astype(weights.dtype))
        assert out.weights.dtype == jnp.float32
        return jnp.sum(y * y)[None]

    def idx_of(x):
        return jax.lax.dynamic_slice_in_dim(jnp.array(idx), 4 * jax.lax.axis_index("expert"), 4)

    total = lambda *args: spmd.shard(run, group.mesh)(*args).sum()  # noqa: E731
    step = jax.jit(jax.value_and_grad(total))
    weights = np.linspace(0.25, 2, 16).reshape(8, 2)
    for dtype in WEIGHTS:
        narrow = jnp.asarray(weights, dtype)
        value, gradient = step(narrow, x)
        want, want_gradient = step(narrow.astype(jnp.float32), x)
        assert gradient.dtype == narrow.dtype
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_array_equal(gradient, want_gradient.astype(dtype))
