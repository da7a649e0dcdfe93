"""The kernels for Hopper GPUs: their schedule, that they lower anywhere, their values on GPUs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _compat
from jax_ep._grouped_dot import hopper
from jax_ep._grouped_dot import products as products_of
from jax_ep._grouped_dot.hopper.tile_table import tile_table
from kernel_grids import blocks_of_kernels, modules_of_kernels
from test_grouped_dot import SIZES, numpy_grouped_dot, problem, with_gradients

needs_hopper = pytest.mark.skipif(not _compat.targets_hopper(), reason="needs a Hopper GPU")
WIDTHS = [(128, 128), (256, 384), (512, 256)]
DTYPES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
table_of = jax.jit(tile_table, static_argnums=(1, 2), static_argnames="with_unused")


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("tile", [8, 128])
def test_tile_table(case, tile):
    """Every row is in one tile of its group, and tiles begin at multiples of 8 rows."""
    rows, sizes = SIZES[case]
    owner = np.full(rows, -1)
    owner[: sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    for with_unused in (True, False):
        table = table_of(jnp.array(sizes, jnp.int32), rows, tile, with_unused=with_unused)
        seen = np.full(rows, -2)
        for group, begin, first, end in zip(*map(np.asarray, table), strict=True):
            if first == end:
                continue
            assert begin % 8 == 0
            assert begin <= first < end <= begin + tile
            assert (seen[first:end] == -2).all()
            seen[first:end] = group
        wanted = owner if with_unused else np.where(owner < 0, -2, owner)
        np.testing.assert_array_equal(seen, wanted)


def test_the_table_of_tiles_has_room_for_any_sizes():
    """Groups of one row more than tiles have, which begin anywhere, need the most tiles."""
    rng = np.random.default_rng(0)
    for tile, _ in itertools.product((8, 64, 128), range(4)):
        sizes = rng.choice([0, 1, 2, 6, tile - 1, tile, tile + 1, tile + 2], 20)
        rows = int(sizes.sum()) + 3  # in any order, so the orders share a program
        for _ in range(20):
            rng.shuffle(sizes)
            table = table_of(jnp.array(sizes, jnp.int32), rows, tile, with_unused=True)
            _, _, first, end = map(np.asarray, table)
            assert (end - first).sum() == rows


def test_why_not():
    why_not = hopper.why_not
    assert why_not(jnp.bfloat16, 8, 128, 256) is None
    assert "multiples of 128 channels, not 100 and 256" in why_not(jnp.bfloat16, 8, 100, 256)
    assert "none for int8" in why_not(jnp.dtype(jnp.int8), 8, 128, 128)
    assert "no rows" in why_not(jnp.bfloat16, 0, 128, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(256, 384), (512, 256)])
def test_lowers_for_gpus_anywhere(dtype, inner, outer):
    """Forward and backward, with rows that no tile divides: Pallas checks shapes and shared memory."""
    given = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in [(1003, inner), (4, inner, outer), (1003, outer)]
    ]

    def passes(lhs, rhs, d_out, sizes):
        return (
            hopper.rows_by_matrices(lhs, rhs, sizes, contract=0),
            hopper.rows_by_matrices(d_out, rhs, sizes, contract=1),
            hopper.rows_by_rows(lhs, d_out, sizes),
            *hopper.rows_by_pair(lhs, (rhs, rhs), sizes),
            hopper.sum_of_pair((d_out, d_out), (rhs, rhs), sizes),
            *hopper.pair_by_rows(lhs, (d_out, d_out), sizes),
        )

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    exported = jax.export.export(jax.jit(passes), platforms=["cuda"])(*given, sizes)
    of_rows, of_matrices = (1003, outer), (4, inner, outer)
    assert [a.shape for a in exported.out_avals] == [
        *(of_rows, (1003, inner), of_matrices),
        *(of_rows, of_rows, (1003, inner), of_matrices, of_matrices),
    ]
    assert exported.mlir_module().count("mosaic_gpu_v2") >= 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_equal_calls_are_lowered_once(monkeypatch, dtype):
    """Three equal layers and their gradients have the kernels of one, and call them three times.

    The kernels have the same bytes in both programs. So jaxlib, which identifies kernels by their
    bytes, compiles them once, and JAX's persistent cache finds the programs.
    """
    monkeypatch.setattr(_compat, "targets_hopper", lambda: True)
    lhs = jax.ShapeDtypeStruct((136, 128), dtype)
    rhs = jax.ShapeDtypeStruct((2, 128, 128), dtype)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(lhs, layers, sizes):
        for rhs in layers:
            lhs = jax_ep.grouped_dot(lhs, rhs, sizes)
        return lhs.astype(jnp.float32).sum()

    def lowered(layers):
        """The kernels; calls for rows (forward and backward), calls for the gradient of matrices."""
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        text = lowered_for_gpus(step, lhs, [rhs] * layers, sizes)
        names = ["call @rows_by_matrices", "call @rows_by_rows"]
        return modules_of_kernels(text), [
            len(re.findall(rf"{name}(_\d+)?\(", text)) for name in names
        ]

    kernels, calls = lowered(1)
    assert len(set(kernels)) == 3 and calls == [2, 1]
    assert lowered(3) == (kernels, [6, 3])


def lowered_for_gpus(function, *given):
    return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def products(lhs, rhs, d_out, sizes):
    by_matrices = hopper.rows_by_matrices(lhs, rhs, sizes, contract=0)
    return by_matrices, hopper.rows_by_rows(lhs, d_out, sizes)


@pytest.fixture(scope="module")
def operands():
    """What ``products`` takes."""
    lhs, rhs = jnp.zeros((136, 128), jnp.bfloat16), jnp.zeros((2, 128, 256), jnp.bfloat16)
    return lhs, rhs, jnp.zeros((136, 256), jnp.bfloat16), jnp.zeros(2, jnp.int32)


@pytest.fixture(scope="module")
def kernels_alone(operands):
    """The kernels of ``products`` with nothing around. Each takes seconds to lower."""
    hopper.custom_call.cache_clear()
    kernels = modules_of_kernels(lowered_for_gpus(products, *operands))
    assert len(kernels) == 2
    return kernels


@pytest.mark.parametrize("around", ["shard_map", "checked shard_map", "vmap", "x64", "mesh"])
def test_kernels_know_nothing_of_what_is_around(operands, kernels_alone, around):
    """The same kernel under transformations and settings, and after others."""
    given = lhs, _, _, sizes = operands
    hopper.custom_call.cache_clear()
    lowered_for_gpus(lambda lhs, sizes: hopper.rows_by_rows(lhs, lhs, sizes), lhs, sizes)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("expert",))
    setting, function = contextlib.nullcontext(), products
    if around == "vmap":
        given = tuple(jnp.stack([x] * 3) for x in given)
        function = jax.vmap(products)
    elif around == "x64":
        setting = jax.enable_x64(True)
    elif around == "mesh":
        setting = jax.set_mesh(mesh)
    else:
        function = jax.shard_map(
            products,
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
            check_vma=around.startswith("checked"),
        )
    with setting:
        assert modules_of_kernels(lowered_for_gpus(function, *given)) == kernels_alone


def step(num_sms, lhs, rhs, sizes):
    """A product and its gradients."""
    out, pull = jax.vjp(lambda *a: jax_ep.grouped_dot(*a, sizes, num_sms=num_sms), lhs, rhs)
    return out, *pull(out)


@pytest.mark.parametrize(("num_sms", "blocks"), [(None, 132), (108, 108), (1, 1), (1000, 132)])
def test_kernels_run_on_as_many_sms_as_they_may_occupy(monkeypatch, num_sms, blocks):
    """All three products; more SMs than the GPU has are all of them."""
    monkeypatch.setattr(_compat, "targets_hopper", lambda: True)
    given = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in [(136, 128), (2, 128, 128)]]
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = lowered_for_gpus(functools.partial(step, num_sms), *given, sizes)
    assert blocks_of_kernels(text) == [blocks] * 3


def test_fewer_sms_under_vmap_and_in_exports(monkeypatch):
    monkeypatch.setattr(_compat, "targets_hopper", lambda: True)
    lhs, rhs = (jax.ShapeDtypeStruct(s, "bfloat16") for s in [(3, 136, 128), (3, 2, 128, 128)])
    sizes = jax.ShapeDtypeStruct((3, 2), jnp.int32)
    mapped = jax.vmap(functools.partial(step, 20))
    text = lowered_for_gpus(mapped, lhs, rhs, sizes)
    assert blocks_of_kernels(text) == [20] * 3
    # Exports have kernels in a form for other versions, whose grid this version may not read.
    launch = importlib.import_module("jax_ep._grouped_dot.hopper.launch")
    with mock.patch.object(launch, "pallas_kernel", wraps=launch.pallas_kernel) as lowered:
        jax.export.export(jax.jit(mapped), platforms=["cuda"])(lhs, rhs, sizes)
    assert [call.args[1] for call in lowered.call_args_list] == [20] * 3


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(case, width, dtype):
    """They are those of float64; NaN in unused rows reaches nothing."""
    rows, sizes = SIZES[case]
    lhs, rhs, d_out, unused = (
        np.float64(jnp.asarray(a, dtype)) if isinstance(a, np.ndarray) else a
        for a in problem(rows, sizes, *width)
    )
    want, gradients = numpy_grouped_dot(lhs, rhs, sizes)
    wants = [want, *gradients(d_out)]
    lhs[unused] = d_out[unused] = np.nan
    gots = jax.jit(with_gradients)(
        *(jnp.asarray(a, dtype) for a in (lhs, rhs)),
        jnp.array(sizes, jnp.int32),
        jnp.asarray(d_out, dtype),
    )
    for got, want in zip(gots, wants, strict=True):
        scale = np.abs(want).max() + 1e-9
        np.testing.assert_allclose(np.float64(got) / scale, want / scale, atol=DTYPES[dtype])
    assert not np.any(gots[0][unused]) and not np.any(gots[1][unused])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", SIZES)
def test_pairs(case, width, dtype):
    """Two products at once, and their gradients; NaN in unused rows reaches nothing."""
    rows, sizes = SIZES[case]
    lhs, first, d_first, unused = problem(rows, sizes, *width)
    _, second, d_second, _ = problem(rows, sizes, *width)
    second, d_second = second[::-1] + 0.5, d_second[::-1] - 0.5
    given = [np.float64(jnp.asarray(a, dtype)) for a in (lhs, first, second, d_first, d_second)]
    lhs, first, second, d_first, d_second = given
    out, gradients = numpy_grouped_dot(lhs, first, sizes)
    other_out, other_gradients = numpy_grouped_dot(lhs, second, sizes)
    d_lhs, d_matrices = gradients(d_first)
    other_d_lhs, other_d_matrices = other_gradients(d_second)
    wants = [out, other_out, d_lhs + other_d_lhs, d_matrices, other_d_matrices]
    lhs[unused] = d_first[unused] = d_second[unused] = np.nan
    lhs, *both = (jnp.asarray(a, dtype) for a in given)
    sizes = jnp.array(sizes, jnp.int32)
    gots = [
        *hopper.rows_by_pair(lhs, tuple(both[:2]), sizes),
        hopper.sum_of_pair(tuple(both[2:]), tuple(both[:2]), sizes),
        *hopper.pair_by_rows(lhs, tuple(both[2:]), sizes),
    ]
    for got, want in zip(gots, wants, strict=True):
        scale = np.abs(want).max() + 1e-9
        np.testing.assert_allclose(np.float64(got) / scale, want / scale, atol=DTYPES[dtype])
    assert not any(np.any(got[unused]) for got in gots[:3])
    without = [
        *hopper.rows_by_pair(lhs, tuple(both[:2]), sizes, clears=False),
        hopper.sum_of_pair(tuple(both[2:]), tuple(both[:2]), sizes, clears=False),
    ]
    used = slice(0, unused.start)
    for got, want in zip(without, gots, strict=False):
        np.testing.assert_array_equal(np.float32(got[used]), np.float32(want[used]))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("check_vma", [True, False])
def test_transformations(check_vma):
    """Results are the same under shard_map, scan, remat and donation."""
    lhs, rhs, _, _ = problem(300, (100, 0, 150), 128, 128)
    lhs, rhs = jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs / 12, jnp.bfloat16)
    sizes = jnp.array((100, 0, 150), jnp.int32)

    def loss(rhs, lhs, sizes):
        def step(x, _):
            return jnp.tanh(jax.checkpoint(jax_ep.grouped_dot)(x, rhs, sizes)), None

        return jax.lax.scan(step, lhs, length=4)[0].astype(jnp.float32).sum()

    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(rhs, lhs, sizes)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("expert",))
    sharded = jax.shard_map(
        jax.grad(loss, argnums=(0, 1)),
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
        check_vma=check_vma,
    )
    got = jax.jit(sharded, donate_argnums=1)(rhs, jnp.array(lhs), sizes)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.gpu
@needs_hopper
def test_vmap():
    """The result is that of one product after the other."""
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.normal(size=(3, 300, 128)), jnp.bfloat16)
    rhs = jnp.asarray(rng.normal(size=(3, 2, 128, 256)), jnp.bfloat16)
    sizes = jnp.array([[100, 150], [0, 300], [7, 0]], jnp.int32)
    got = jax.jit(jax.vmap(jax_ep.grouped_dot))(lhs, rhs, sizes)
    want = [jax_ep.grouped_dot(*operands) for operands in zip(lhs, rhs, sizes, strict=True)]
    np.testing.assert_array_equal(np.float32(got), np.float32(jnp.stack(want)))


@pytest.mark.gpu
@needs_hopper
def test_what_kernels_cannot_do_is_said(caplog):
    """Other widths go through the loop, with a warning."""
    products_of._warn_of_loop.cache_clear()
    out = jax.jit(functools.partial(jax_ep.grouped_dot))(
        jnp.ones((16, 24)), jnp.ones((2, 24, 8)), jnp.array([4, 8], jnp.int32)
    )
    np.testing.assert_array_equal(out[:12], 24)
    assert "multiples of 128 channels, not 24 and 8" in caplog.text
