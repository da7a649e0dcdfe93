"""Ordinals tell the calls of a program apart, and a program is always lowered to the same text."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from spmd import make_group, need_part, ranks_at_most, shard, stacked_jit

RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 4, 2, 8
EXPERTS = 2 * RANKS
SHAPES = [
    jax.ShapeDtypeStruct((RANKS * TOKENS, HIDDEN), jnp.float32),
    jax.ShapeDtypeStruct((RANKS * TOKENS, TOP_K), jnp.int32),
]


@pytest.fixture
def group(native_backend) -> jax_ep.Group:
    if native_backend == "reference":
        pytest.skip("looks at the calls of native targets")
    group = make_group(RANKS, native_backend)
    need_part(group.mesh)
    return group


def layer_calls(group) -> list[str]:
    """The native calls of ``layer``: a dispatch with its plan is one on GPUs."""
    dispatch = ["plan_dispatch"] if group.backend == "cuda" else ["plan", "dispatch"]
    return [*dispatch, "combine"]


def layer(group, x, idx):
    """A dispatch with its plan, and a combine."""
    out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
    return x + jax_ep.combine(jnp.tanh(out.tokens), out.handle, group=group)


def layers(group, count, wrap=lambda f: f):
    """``count`` equal layers, each a function of its own under ``wrap``."""

    def run(x, idx):
        for _ in range(count):
            x = wrap(lambda x: layer(group, x, idx))(x)
        return x

    return run


def lower(group, fn, **options) -> str:
    return jax.jit(shard(fn, group.mesh, **options)).lower(*SHAPES).as_text()


def calls(text: str) -> list[tuple[str, int]]:
    """Name and ordinal of each call in the text of a lowered module."""
    found = re.findall(r"@jax_ep_(\w+)\(.*?\bordinal = (\d+) : i32", text)
    assert len(found) == text.count("custom_call @jax_ep_")
    return [(name, int(ordinal)) for name, ordinal in found]


def ordinals(text: str) -> list[int]:
    """The ordinals in the text of a lowered module, sorted."""
    return sorted(ordinal for _, ordinal in calls(text))


@pytest.mark.parametrize("check_vma", [True, False])
def test_equal_calls(group, check_vma):
    """Two equal layers: no two calls share an ordinal, whatever was lowered before."""
    text = lower(group, layers(group, 2), check_vma=check_vma)
    names = layer_calls(group)
    assert calls(text) == list(zip(names * 2, range(2 * len(names)), strict=True))
    assert ordinals(lower(group, layers(group, 3))) == list(range(3 * len(names)))
    assert lower(group, layers(group, 2), check_vma=check_vma) == text


def test_profiles_name_the_op(group):
    """Profiles show the op and not only the primitive of all native calls."""
    text = jax.jit(shard(layers(group, 1), group.mesh)).lower(*SHAPES).compile().as_text()
    for name in layer_calls(group):
        (line,) = (s for s in text.splitlines() if f'custom_call_target="jax_ep_{name}"' in s)
        assert re.search(rf'op_name="[^"]*\bjax_ep_{name}/jax_ep_call"', line), line


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_gradients(group, wrap):
    """The calls of the backward pass and rematerialised calls have ordinals like others."""
    run = layers(group, 2, wrap)

    def gradient(x, idx):
        return jax.grad(lambda x: jnp.sin(run(x, idx)).sum())(x)

    found = ordinals(lower(group, gradient))
    assert found == list(range(len(found)))
    assert len(found) >= 2 * len(layer_calls(group)) + 4  # and two in the backward pass of each


def test_what_is_lowered_once(group):
    """A function under jit that is called twice is one function of the module, a loop has one body."""

    def twice(x, idx):
        block = jax.jit(lambda x: layer(group, x, idx))
        return block(block(x))

    def looped(x, idx):
        body = lambda x, _: (layer(group, x, idx), None)  # noqa: E731
        return layer(group, jax.lax.scan(body, x, None, length=5)[0], idx)

    count = len(layer_calls(group))
    assert ordinals(lower(group, twice)) == list(range(count))
    assert ordinals(lower(group, looped)) == list(range(2 * count))


def test_batched_call(group):
    """A vmap is a loop over one call, whose ordinal is counted once."""

    def run(x, idx):
        return jax.vmap(lambda x: layer(group, x, idx))(jnp.stack([x, 2 * x])).sum(axis=0)

    assert ordinals(lower(group, run)) == list(range(len(layer_calls(group))))


@pytest.mark.one_process("exports a program of its devices")
def test_export(group):
    """Lowering for several platforms at once; an exported program keeps the ordinals it has."""
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{name}") for name in layer_calls(group)
    ]
    jitted = jax.jit(shard(layers(group, 2), group.mesh))
    sharding = jax.NamedSharding(group.mesh, jax.sharding.PartitionSpec("expert"))
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in SHAPES]
    exported = jax.export.export(jitted, platforms=("cpu", "cuda"), disabled_checks=checks)(*shapes)
    count = 2 * len(layer_calls(group))
    assert ordinals(exported.mlir_module()) == list(range(count))
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal(SHAPES[0].shape, np.float32), sharding)
    idx = jax.device_put(rng.permuted(np.tile(np.arange(EXPERTS), (len(x), 1)), axis=1), sharding)
    idx = idx[:, :TOP_K].astype(jnp.int32)
    np.testing.assert_array_equal(jax.jit(exported.call)(x, idx), jitted(x, idx))


@pytest.mark.one_process("runs op by op")
def test_eager(native_backend):
    """Without jit each call is a program; results are the same."""
    group = make_group(RANKS, native_backend)
    need_part(group.mesh)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    idx = np.tile(np.arange(TOP_K, dtype=np.int32), (RANKS, TOKENS, 1))
    wanted = stacked_jit(layers(group, 1), group.mesh)(x, idx)
    with jax.disable_jit():
        found = stacked_jit(layers(group, 1), group.mesh)(x, idx)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_tag():
    """The tag of an op in the flags on GPUs differs by ordinal, for the ordinals of any program."""
    cuda = pytest.importorskip("jax_ep._cuda", reason="the GPU backend was not built (no nvcc)")
    tags = [cuda.op_tag(op=1, shape=[96, 4, 512], ordinal=n) for n in range(2**15)]
    assert len(set(tags)) == len(tags)
    assert all(0 < tag < 2**16 for tag in tags)
    others = [cuda.op_tag(op, shape, 0) for op in range(4) for shape in ([96, 4], [96, 5], [4, 96])]
    assert len(set(others)) == len(others)
