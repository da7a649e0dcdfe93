"""Which mesh axes ``jax_ep.moe`` splits tokens over, and its warning where ranks repeat them."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing
from jax_ep._moe import token_axes
from jax_ep._moe.params import moe_param_shapes

pytestmark = pytest.mark.one_process("looks at how programs of one process are traced")

H, E, TOKENS = 8, 8, 16
X = jax.ShapeDtypeStruct((TOKENS, H), jnp.float32)


def make_group(names, axis="expert") -> jax_ep.Group:
    mesh = spmd.make_mesh((2,) * len(names), names)
    return jax_ep.create_group(mesh, axis, backend="reference")


def tokens_of_a_rank(group, x, **options) -> int:
    """How many tokens a rank routes; nothing is compiled or run."""
    seen = []

    def router(logits, bias):
        seen.append(logits.shape[0])
        return routing.softmax_top_k(logits, 2)

    weights = moe_param_shapes(hidden=H, intermediate=4, num_experts=E)
    settings = {"num_experts": E, "top_k": 2, "router": router} | options
    jax.eval_shape(functools.partial(jax_ep.moe, group=group, **settings), x, weights)
    (tokens,) = seen
    return tokens


@pytest.mark.parametrize(
    ("names", "axis", "parts"),
    [
        (("expert",), "expert", 2),
        (("dp", "expert"), "expert", 4),
        (("expert", "batch"), "expert", 4),
        (("replica", "fsdp", "expert"), "expert", 8),
        (("seq", "expert"), "expert", 4),
        (("pod", "expert", "tensor"), ("pod", "expert"), 4),
        (("data", "expert", "model"), "expert", 4),
        (("data", "Stage", "expert"), "expert", 4),
        (("data", "model"), "model", 4),  # the group's own axes always split tokens
    ],
)
def test_default(names, axis, parts):
    """All axes but those of tensor and pipeline parallelism, whatever they are called."""
    spmd.need_devices(2 ** len(names))
    group = make_group(names, axis)
    assert tokens_of_a_rank(group, X) == TOKENS // parts
    assert tokens_of_a_rank(group, X, token_axes=group.axis_names) == TOKENS // group.size


def test_outside_jit():
    """As inside ``jit``, where ``moe`` cannot see that the tokens are split over one axis only."""
    spmd.need_devices(4)
    group, seen = make_group(("dp", "expert")), []

    def router(logits, bias):
        seen.append(logits.shape[0])
        return routing.softmax_top_k(logits, 2)

    x = jax.device_put(np.ones((TOKENS, H), np.float32), NamedSharding(group.mesh, P("dp")))
    shapes = moe_param_shapes(hidden=H, intermediate=4, num_experts=E)
    weights = jax.tree.map(lambda w: np.ones(w.shape, w.dtype), shapes)
    jax_ep.moe(x, weights, group=group, num_experts=E, top_k=2, router=router)
    assert seen == [TOKENS // 4]


@pytest.fixture
def warnings(monkeypatch, caplog):
    """The warnings that are logged, as if none had been logged before."""
    monkeypatch.setattr(token_axes, "_warned", set())
    caplog.set_level(logging.WARNING, "jax_ep")
    return caplog


def test_repeated_tokens_are_said_once(warnings):
    spmd.need_devices(8)
    group = make_group(("data", "expert", "tensor"))
    for _ in range(2):
        tokens_of_a_rank(group, X)
    (text,) = warnings.messages
    assert "axes tensor=2 work on the same tokens" in text
    assert "token_axes=('data', 'tensor', 'expert')" in text
    assert tokens_of_a_rank(group, X, token_axes=("data", "tensor", "expert")) == TOKENS // 8


def test_nothing_is_said_where_it_is_meant_or_nothing_is_repeated(warnings):
    spmd.need_devices(8)
    tokens_of_a_rank(make_group(("data", "expert", "tensor")), X, token_axes=("data", "expert"))
    tokens_of_a_rank(make_group(("dp", "expert")), X)
    mesh = spmd.make_mesh((2, 2, 1), ("data", "expert", "tensor"))
    tokens_of_a_rank(jax_ep.create_group(mesh, backend="reference"), X)
    assert warnings.messages == []
