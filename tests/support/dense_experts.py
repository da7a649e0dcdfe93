"""A layer with any of ``moe``'s experts written out densely, for one device, without ranks or rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
import spmd
from jax_ep import routing


def dense_layer(
    x, params, *, top_k, expert=None, activation=jax.nn.silu, mask=None, num_used_experts=None
):
    """Each expert for every token, weighted by the router.

    Args:
        x: ``[..., H]``.
        params: ``MoEParams``.
        top_k: Experts of each token.
        expert: A function of tokens and the id of an expert; None for the experts of jax_ep.
        activation: Theirs.
        mask: Which tokens take part.
        num_used_experts: As in ``moe``.

    Returns:
        The output, and the auxiliary loss with the load.
    """
    tokens, num_experts = x.reshape(-1, x.shape[-1]), params.router_kernel.shape[1]
    num_used = num_used_experts or num_experts
    logits = tokens.astype(jnp.float32) @ params.router_kernel
    routes = routing.Router()(logits, top_k, params.router_bias, num_used_experts=num_used)
    used = routes.topk_idx if mask is None else jnp.where(mask.reshape(-1, 1), routes.topk_idx, -1)
    expert = expert or functools.partial(_expert, params, activation)
    y = 0.0
    for index in range(num_used):
        weight = jnp.where(used == index, routes.topk_weights, 0.0).sum(1)
        y += weight[:, None] * expert(tokens, index)
    if params.shared is not None:
        shared = _mlp(tokens, *params.shared, (None, None, None), activation)
        y += shared if mask is None else jnp.where(mask.reshape(-1, 1), shared, 0)
    load = (used.reshape(-1, 1) == jnp.arange(num_experts)).sum(0)
    aux_loss = routing.load_balancing_loss(used, routes.scores, num_used_experts=num_used_experts)
    return y.reshape(x.shape), (aux_loss, load)


def _expert(params, activation, tokens, index):
    of = lambda weight: None if weight is None else weight[index]  # noqa: E731
    biases = tuple(map(of, (params.gate_bias, params.up_bias, params.down_bias)))
    return _mlp(tokens, of(params.gate), params.up[index], params.down[index], biases, activation)


def _mlp(tokens, gate, up, down, biases, activation):
    gate_bias, up_bias, down_bias = (0.0 if bias is None else bias for bias in biases)
    inner = tokens @ up + up_bias
    if gate is None:
        inner = activation(inner)
    elif isinstance(activation, jax_ep.GatedActivation):
        inner = activation(tokens @ gate + gate_bias, inner)
    else:
        inner = activation(tokens @ gate + gate_bias) * inner
    return inner @ down + down_bias


def step(layer):
    """A function of x and weights: output, statistics, and gradients of x and the float weights."""

    def run(x, params):
        leaves, tree = jax.tree.flatten(params)
        smooth = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def loss(x, moving):
            moving = iter(moving)
            pairs = zip(leaves, smooth, strict=True)
            merged = [next(moving) if is_smooth else leaf for leaf, is_smooth in pairs]
            y, aux = layer(x, jax.tree.unflatten(tree, merged))
            target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * target) + aux[0], (y, tuple(aux[:2]))

        moving = [w for w, is_smooth in zip(leaves, smooth, strict=True) if is_smooth]
        (_, (y, aux)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, moving)
        return y, aux, gradients

    return run


def compiled_step(dense):
    """``jax.jit(step(dense))``; equal options of one function share their programs."""
    options = dense.keywords if isinstance(dense, functools.partial) else {}
    arrays = any(isinstance(option, jax.Array) for option in options.values())  # have no hash
    if not options or arrays or dense.args:
        return jax.jit(step(dense))
    return _compiled_step(dense.func, **options)


@functools.cache
def _compiled_step(function, **options):
    return jax.jit(step(functools.partial(function, **options)))


def check_same(layer, dense, x, params, *, mesh, tolerance=1e-5):
    """Outputs, statistics and all gradients of ``layer``, on ``mesh``, are those of ``dense``."""
    y, aux, (d_x, d_params) = spmd.whole_jit(step(layer), mesh)(x, params)
    want_y, want_aux, (want_x, want_params) = jax.device_get(compiled_step(dense)(x, params))
    np.testing.assert_array_equal(aux[1], want_aux[1])
    names = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(params)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    pairs = {"y": (y, want_y), "aux_loss": (aux[0], want_aux[0]), "x": (d_x, want_x)}
    pairs |= {n: pair for n, *pair in zip(names, d_params, want_params, strict=True)}
    for name, (got, want) in pairs.items():
        got, want = (np.asarray(array, np.float32) for array in (got, want))
        assert "router_bias" in name or np.abs(want).max() > 0, name
        assert np.isfinite(want).all(), name
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale, err_msg=name)
