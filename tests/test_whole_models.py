"""Ordinary Flax models train on every mesh that README and the docstrings show."""

from __future__ import annotations

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from whole_models import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    VOCABULARY,
    DenseLinen,
    DenseNNX,
    ModelLinen,
    ModelNNX,
    fill,
)

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("trains with arrays of one process"),
]

ROOT = pathlib.Path(__file__).parents[1]
AUTO = AxisType.Auto
# The calls as pages and docstrings show them, and the meshes that they make.
SHOWN = {
    'jax.sharding.Mesh(jax.devices(), ("expert",))': ((8,), ("expert",)),
    'jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)': (
        (2, 4),
        ("data", "expert"),
    ),
}
PAGES = [
    "README.md",
    "docs/start.md",
    "docs/sharding.md",
    "docs/network.md",
    "jax_ep",
    "examples/moe_layer.py",
]
PAGES += ["docs/guides/flax_nnx.md", "docs/guides/flax_linen.md"]
STEPS, RATE, BATCH, LENGTH = 3, 0.5, 8, 3


def calls(text: str) -> set[str]:
    """The calls in ``text`` that make a mesh with named axes."""
    text = " ".join(text.split()).replace("make_mesh(sizes,", "make_mesh((2, 4),")  # on 8 devices
    found = set()
    for match in re.finditer(r"jax\.(make_mesh|sharding\.Mesh)\(", text):
        end, depth = match.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        found.add(re.sub(r"(?<=\() | (?=\))", "", text[match.start() : end]))
    return {call for call in found if '"' in call}


def test_all_meshes_that_are_shown_are_tried():
    paths = [ROOT / page for page in PAGES]
    files = [file for path in paths for file in ([path], path.rglob("*.py"))[path.is_dir()]]
    shown = [file for file in files if not {"bench", "doctor"} & set(file.parts)]
    found = [calls(file.read_text()) for file in shown]
    assert set().union(*found) == set(SHOWN)


def make_group(shown: str, backend: str, axis_type: AxisType = AUTO) -> jax_ep.Group:
    sizes, names = SHOWN[shown]
    mesh = spmd.make_mesh(spmd.fit(sizes, names), names, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Ids and the ids to predict."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH))
    return ids, (ids * 5 + 1) % VOCABULARY


def train(apply, weights, ids, labels):
    """Losses of some steps, and the gradients of the first."""

    @jax.jit
    def step(weights):
        def loss_fn(weights):
            logits, aux = apply(weights, ids)
            chosen = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, VOCABULARY), -1)
            return 0.01 * aux.aux_loss - chosen.mean()

        loss, gradients = jax.value_and_grad(loss_fn)(weights)
        moved = jax.tree.map(lambda w, g: w - RATE * g, weights, gradients)
        return loss, gradients, moved

    losses, first = [], None
    for _ in range(STEPS):
        loss, gradients, weights = step(weights)
        losses.append(float(loss))
        first = gradients if first is None else first
    return losses, jax.device_get(first)


def check(found, want) -> None:
    losses, gradients = found
    np.testing.assert_allclose(losses, want[0], rtol=1e-5)
    assert losses[0] > losses[1] > losses[2]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want[1])]
    for name, got, expected in zip(names, *map(jax.tree.leaves, (gradients, want[1])), strict=True):
        assert np.abs(expected).max() > 0 or "bias" in name, name
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def put(group, *arrays):
    """A batch split over the first axis of the mesh."""
    sharding = NamedSharding(group.mesh, P(group.mesh.axis_names[0]))
    return jax.device_put(arrays, (sharding,) * len(arrays))


# ---- NNX


def train_nnx(moe, ids, labels, *, mesh=None, batch_spec=None):
    graph, state = nnx.split(nnx.eval_shape(lambda: ModelNNX(moe, nnx.Rngs(0), batch_spec)))
    weights = fill(nnx.to_pure_dict(state))
    if mesh is not None:
        restored = jax.device_put(weights, jax.devices()[0])
        weights = jax.device_put(restored, NamedSharding(mesh, P()))

    def apply(weights, ids):
        own = nnx.State(jax.tree.map(lambda x: x, state))
        nnx.replace_by_pure_dict(own, weights)
        return nnx.merge(graph, own)(ids)

    return train(apply, weights, ids, labels)


@functools.cache
def dense_nnx():
    return train_nnx(DenseNNX, *batch())


def moe_nnx(group):
    make = functools.partial(jax_ep.nnx.MoE, HIDDEN, INTERMEDIATE, num_experts=EXPERTS, top_k=TOP_K)
    return functools.partial(make, group=group)


@pytest.mark.parametrize("shown", SHOWN)
def test_nnx(shown, native_backend):
    group = make_group(shown, native_backend)
    check(train_nnx(moe_nnx(group), *put(group, *batch())), dense_nnx())


def test_nnx_on_explicit_axes(native_backend):
    """The embedding names the sharding of its result. The weights were restored on one device."""
    group = make_group(list(SHOWN)[1], native_backend, AxisType.Explicit)
    with jax.set_mesh(group.mesh):
        found = train_nnx(
            moe_nnx(group), *put(group, *batch()), mesh=group.mesh, batch_spec=P("data")
        )
    check(found, dense_nnx())


# ---- Linen


def train_linen(moe, ids, labels):
    model = ModelLinen(moe)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))
    return train(model.apply, fill(shapes), ids, labels)


@functools.cache
def dense_linen():
    return train_linen(DenseLinen(), *batch())


@pytest.mark.parametrize("shown", SHOWN)
def test_linen(shown, native_backend):
    group = make_group(shown, native_backend)
    moe = jax_ep.linen.MoE(HIDDEN, INTERMEDIATE, num_experts=EXPERTS, top_k=TOP_K, group=group)
    check(train_linen(moe, *put(group, *batch())), dense_linen())
