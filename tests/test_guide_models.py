"""The models of docs/guides/flax_nnx.md and flax_linen.md against the same models with dense layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import dense_routed
import jax_ep
import spmd
from guide_pages import linen, nnx_model

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("trains with arrays of one process"),
]
WEIGHTS = ("router_kernel", "gate", "up", "down")


def make_mesh() -> jax.sharding.Mesh:
    names = ("data", "expert")
    return spmd.make_mesh(spmd.fit((2, 4), names), names, AxisType.Auto)


def dense(x, weights: dict[str, Any], bias, mask) -> tuple[jax.Array, jax_ep.MoEAux]:
    """Output and report of the layer that both guides use, on one device and without noise."""
    logits = x @ weights["router_kernel"]
    routes = dense_routed.route(logits, top_k=2, score=jax.nn.sigmoid, bias=bias)
    real = mask[..., None]
    y = dense_routed.experts(jnp.where(real, x, 0), routes.weights * real, weights)
    report = dense_routed.report(routes, 2, mask)
    return y, jax_ep.MoEAux(
        report.aux_loss,
        report.load,
        jnp.int32(0),
        jnp.int32(0),
        report.z_loss,
        report.sequence_loss,
    )


def check(found, want) -> None:
    """Losses and all gradients are the same, and no gradient is zero that could be another."""
    (loss, auxes), gradients = jax.device_get(found)
    (want_loss, want_auxes), want_gradients = jax.device_get(want)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for aux, want_aux in zip(auxes, want_auxes, strict=True):
        np.testing.assert_array_equal(aux.load, want_aux.load)
        assert aux.num_dropped == 0
        for name in ("aux_loss", "z_loss", "sequence_loss"):
            got, expected = getattr(aux, name), getattr(want_aux, name)
            np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    found_leaves = jax.tree.leaves_with_path(gradients)
    assert len(found_leaves) == len(jax.tree.leaves(want_gradients)) > 20
    for (path, got), expected in zip(found_leaves, jax.tree.leaves(want_gradients), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.abs(expected).max() > 0 or "bias" in name, name
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def check_loss(result, logits, ids, labels) -> None:
    """The loss is what the guides say: padding has no part in it, and each loss its factor."""
    loss, auxes = jax.device_get(result)
    real = np.asarray(ids) != 0
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0][real].mean()
    assert 0 < real.sum() < real.size and len(auxes) == 2
    for aux in auxes:
        assert aux.load.sum() == 2 * real.sum()
        want += 1e-2 * aux.aux_loss + 1e-3 * aux.z_loss + 1e-4 * aux.sequence_loss
    np.testing.assert_allclose(loss, want, rtol=1e-6)


# ---- NNX


class DenseNNX(nnx.Module):
    """The dense layer with the weights of ``moe``."""

    def __init__(self, moe: jax_ep.nnx.MoE) -> None:
        for name in WEIGHTS:
            setattr(self, name, nnx.Param(jnp.asarray(np.asarray(getattr(moe, name)[...]))))
        self.router_bias = jax_ep.nnx.RouterBias(jnp.asarray(np.asarray(moe.router_bias[...])))

    def __call__(self, x, *, mask, router_key):
        assert router_key is None
        weights = {name: getattr(self, name)[...] for name in WEIGHTS}
        return dense(x, weights, self.router_bias[...], mask)


def test_nnx_model_is_the_dense_model():
    mesh = make_mesh()
    _, model, _ = nnx_model.make(mesh)
    for index, block in enumerate(model.blocks):
        assert block.moe.gate[...].sharding.spec == jax.P("expert", "data", None)
        block.moe.update_router_bias(jnp.arange(block.moe.num_experts) % (3 + index), 0.05)
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
    ids, labels = nnx_model.make_batch(mesh)

    def step(model, ids, labels):
        grad_fn = nnx.value_and_grad(nnx_model.loss_fn, has_aux=True)
        result, gradients = grad_fn(model, ids, labels)
        return result, nnx.to_pure_dict(gradients)

    found = nnx.jit(step)(model, ids, labels)
    plain = nnx.clone(model)
    for block in plain.blocks:
        block.moe = DenseNNX(block.moe)
    nnx.update(plain, jax.device_put(jax.device_get(nnx.state(plain)), jax.devices()[0]))
    ids, labels = jax.device_get((ids, labels))
    want = nnx.jit(step)(plain, ids, labels)
    check(found, want)
    logits, _ = nnx.jit(lambda model, ids: model(ids))(plain, ids)
    check_loss(want[0], np.asarray(logits), ids, labels)


def test_nnx_step_moves_weights_and_biases():
    mesh = make_mesh()
    _, model, optimizer = nnx_model.make(mesh)
    before = nnx.to_pure_dict(nnx.state(model))
    ids, labels = nnx_model.make_batch(mesh)
    nnx_model.train_step(model, optimizer, ids, labels, jax.random.key(2))
    after = nnx.to_pure_dict(nnx.state(model))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    still = [path for path, m in jax.tree.leaves_with_path(moved) if not m]
    # Softmax does not depend on what all keys have in common.
    assert all("key" in jax.tree_util.keystr(path) for path in still), still
    for block in model.blocks:
        bias = np.asarray(block.moe.router_bias[...])
        assert set(np.round(np.abs(bias), 6)) <= {0.0, np.float32(0.001)} and np.any(bias)


# ---- Linen


class DenseLinen(nn.Module):
    """The dense layer, with the arguments of ``jax_ep.linen.MoE``."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    group: Any
    router: Any
    router_bias: bool
    sequence_loss: bool
    partition_names: Any

    @nn.compact
    def __call__(self, x, *, mask):
        H, F, E = self.hidden, self.intermediate, self.num_experts
        shapes = dict(zip(WEIGHTS, ((H, E), (E, H, F), (E, H, F), (E, F, H)), strict=True))
        zeros = nn.initializers.zeros_init()
        weights = {name: self.param(name, zeros, shape) for name, shape in shapes.items()}
        bias = self.variable("router_bias", "bias", jnp.zeros, (E,)).value
        return dense(x, weights, bias, mask)


@functools.cache
def linen_model():
    mesh = make_mesh()
    ids, labels = linen.make_batch(mesh)
    _, model, _, (variables, _) = linen.make(mesh, ids)
    return model, variables, ids, labels


def test_linen_model_is_the_dense_model(monkeypatch):
    model, variables, ids, labels = linen_model()
    params = variables["params"]
    assert params["blocks_0"]["moe"]["gate"].sharding.spec == jax.P("expert", "data", None)
    E = variables["router_bias"]["blocks_0"]["moe"]["bias"].size
    loads = [jnp.arange(E) % 3, jnp.arange(E) % 4]
    for _ in range(50):  # the step of the guide's method is small
        _, biases = model.apply(
            variables, loads, method="update_router_biases", mutable=["router_bias"]
        )
        variables = {**variables, **biases}
    assert np.abs(variables["router_bias"]["blocks_1"]["moe"]["bias"]).max() > 0.04

    def compiled(*arguments):
        def step(params, biases, ids, labels):
            grad_fn = jax.value_and_grad(linen.loss_fn, argnums=1, has_aux=True)
            return grad_fn(model, params, biases, ids, labels)

        lowered = jax.jit(step).lower(*arguments)
        return lowered.compile(), "jax_ep_dispatch" in lowered.as_text()

    arguments = (params, {"router_bias": variables["router_bias"]}, ids, labels)
    step, dispatches = compiled(*arguments)
    found = step(*arguments)
    monkeypatch.setattr(jax_ep.linen, "MoE", DenseLinen)
    arguments = jax.device_get(arguments)
    dense_step, dense_dispatches = compiled(*arguments)
    assert dispatches and not dense_dispatches
    want = dense_step(*arguments)
    check(found, want)
    params, biases, ids, labels = arguments
    logits, _ = jax.jit(lambda *a: model.apply(*a))({"params": params, **biases}, ids)
    check_loss(want[0], np.asarray(logits), ids, labels)


def test_linen_takes_noise_from_the_stream():
    model, variables, ids, labels = linen_model()
    params, biases = variables["params"], {"router_bias": variables["router_bias"]}

    @jax.jit
    def loss(key):
        return linen.loss_fn(model, params, biases, ids, labels, key)[0]

    first, again, other = loss(jax.random.key(1)), loss(jax.random.key(1)), loss(jax.random.key(2))
    assert first == again != other


# ---- both


@pytest.mark.parametrize("flax", [nnx_model, linen], ids=["nnx", "linen"])
def test_program_trains_and_resumes(flax, monkeypatch, capsys):
    devices = len(make_mesh().devices.flat)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    *losses, last, again = flax.main()
    assert len(losses) == 4 and all(a > b for a, b in zip(losses, [*losses[1:], last], strict=True))
    np.testing.assert_allclose(again, last, rtol=1e-6)
    assert "step 3: loss" in capsys.readouterr().out


def test_both_programs_have_the_same_settings():
    """So that one guide can be read instead of the other."""
    group = jax_ep.create_group(make_mesh(), "expert")
    ours = nnx_model.Block(group, nnx.Rngs(0)).moe
    theirs = linen.Block(group).bind({}).moe
    fields = [field.name for field in dataclasses.fields(jax_ep.linen.MoE)]
    for name in fields:
        if hasattr(ours, name) and name not in ("router_bias", "parent", "name"):
            assert getattr(ours, name) == getattr(theirs, name), name
