"""``quantize`` and ``dequantize``, bit for bit against ml_dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
CODES = np.arange(256, dtype=np.uint8).view(E4M3)


def quantize(x: np.ndarray, scale_format: str) -> tuple[np.ndarray, np.ndarray]:
    """The specification in NumPy; ml_dtypes rounds to nearest even in one step."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 128)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = np.maximum(np.abs(blocks).max(-1), np.float32(1e-30)) * np.float32(1 / 448)
        if scale_format == "ue8m0":
            bits = (scales.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
            scales = np.where(np.isnan(scales), scales, bits.view(np.float32))
        inverse = np.float32(1) / scales
        values = np.clip(blocks * inverse[..., None], -448, 448).astype(E4M3)
    return values.reshape(x.shape), scales


def same_bits(got, want: np.ndarray) -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    got = np.asarray(got)
    assert got.dtype == want.dtype
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(unsigned)[~nan], want.view(unsigned)[~nan])


def rows(dtype: np.dtype) -> np.ndarray:
    """``[n, 256]`` rows that are hard for rounding, scales and special values."""
    rng = np.random.default_rng(5)
    tiny, huge = float(ml_dtypes.finfo(dtype).smallest_subnormal), float(ml_dtypes.finfo(dtype).max)
    normal = rng.normal(size=(64, 256)) * 2.0 ** rng.integers(-12, 12, (64, 1))
    # A block whose largest magnitude is 448 has a scale of one: all codes, and what lies halfway
    # between two of them or a little to either side.
    codes = np.sort(CODES[np.isfinite(CODES)].astype(np.float64))
    halfway = (codes[1:] + codes[:-1]) / 2
    grid = [
        np.resize(np.append(halfway * (1 + d), 448), 256) for d in (-1e-3, -1e-7, 0, 1e-7, 1e-3)
    ]
    grid = [np.where(np.arange(256) % 128 == 0, 448, row) for row in [*grid, np.resize(codes, 256)]]
    special = np.zeros((10, 256))
    special[1] = -0.0
    special[2, :3] = tiny, -tiny, 3 * tiny
    special[3, ::2] = rng.uniform(0, 100, 128) * tiny
    special[4] = rng.uniform(-1, 1, 256) * huge
    special[5, 7], special[5, 9] = huge, tiny
    special[6, 3] = np.nan
    special[7, 200], special[7, 201] = np.inf, -1.0
    special[8, 5], special[8, 6] = -np.inf, np.nan
    special[9] = 1e-4 * (np.arange(256) - 128)
    with np.errstate(over="ignore"):
        return np.concatenate([normal, grid, special]).astype(dtype)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype, scale_format):
    x = rows(DTYPES[dtype])
    values, scales = quantize(x, scale_format)
    got = jax.jit(lambda x: jax_ep.quantize(x, scale_format=scale_format))(x)
    same_bits(got.scales, scales)
    same_bits(got.values, values)
    finite = np.isfinite(scales)
    assert finite.any() and not finite.all()
    if scale_format == "ue8m0":
        mantissas, _ = np.frexp(scales[finite])
        np.testing.assert_array_equal(mantissas, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype):
    """Every code with scales from subnormal results to overflow, rounded once to the row dtype."""
    exponents = np.array([-60, -20, -9, -1, 0, 1, 7, 30, 110], np.float32)
    scales = np.stack([2.0**exponents, 2.0**exponents * np.float32(1.2345678)], 1)
    scales = np.append(scales, [[np.nan, np.inf]], axis=0).astype(np.float32)
    values = np.broadcast_to(CODES, (len(scales), 256))
    with np.errstate(invalid="ignore", over="ignore"):
        products = values.astype(np.float32).reshape(-1, 2, 128) * scales[..., None]
        want = products.reshape(-1, 256).astype(DTYPES[dtype])
    q = jax_ep.Quantized(jnp.asarray(values), jnp.asarray(scales))
    same_bits(jax.jit(lambda q: jax_ep.dequantize(q, dtype))(q), want)


def test_round_trip_is_close_and_stable():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(16, 128)), jnp.float32)
    once = jax_ep.dequantize(jax_ep.quantize(x, scale_format="ue8m0"), jnp.float32)
    largest = np.abs(x).max(-1, keepdims=True)
    assert np.all(np.abs(once - x) <= np.maximum(np.abs(x) * 2.0**-4, largest * 2.0**-15))
    twice = jax_ep.dequantize(jax_ep.quantize(once, scale_format="ue8m0"), jnp.float32)
    np.testing.assert_array_equal(once, twice)


def test_hidden_of_whole_blocks():
    with pytest.raises(ValueError, match=r"argument x: expected .* multiple of 128, got shape"):
        jax_ep.quantize(jnp.zeros((2, 100)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jax_ep.quantize([[0.0] * 128]),
            "quantize: argument x: expected an array, got list",
        ),
        (
            lambda: jax_ep.dequantize(jnp.ones((4, 128))),
            "dequantize: argument q: expected jax_ep.Quantized, got .*; make it with jax_ep.quantize",
        ),
        (
            lambda: jax_ep.dequantize(jax_ep.Quantized(jnp.ones((4, 128)), None)),
            "dequantize: argument q.scales: expected an array, got NoneType; make it",
        ),
    ],
)
def test_no_arrays(call, text):
    with pytest.raises(TypeError, match=rf"jax_ep\.{text}"):
        call()


def test_packed_scales_by_hand():
    """The example of the docstring."""
    scales = jnp.array([[1, 2], [0.5, 1], [1, 1], [4, 1]], jnp.float32)
    assert jax_ep.pack_scales(scales).tolist() == [[0x807F, 0x7F7E, 0x7F7F, 0x7F81]]


@pytest.mark.parametrize("shape", [(5, 3), (8, 4), (1, 56), (2, 7, 9), (3, 4, 1)])
def test_packed_scales(shape):
    """As ml_dtypes has these numbers, in 8 bits each; then padded, packed and transposed."""
    rng = np.random.default_rng(0)
    scales = np.ldexp(np.float32(1), rng.integers(-120, 121, shape)).astype(np.float32)
    *outer, rows, blocks = shape
    padded = np.zeros((*outer, -(-rows // 4) * 4, -(-blocks // 4) * 4), np.uint8)
    padded[..., :rows, :blocks] = scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    want = np.swapaxes(padded.view(np.int32), -1, -2)
    got = jax.jit(jax_ep.pack_scales)(scales)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


def test_packed_scales_of_rows():
    """Those of format "ue8m0" say all: a scale is 2 to the power of its 8 bits less 127."""
    x = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    scales = jax_ep.quantize(x, scale_format="ue8m0").scales
    (words,) = np.asarray(jax_ep.pack_scales(scales))
    exponents = words.view(np.uint8).reshape(4, 4).astype(int)
    np.testing.assert_array_equal(np.ldexp(1.0, exponents - 127), scales)
    assert jax_ep.pack_scales(jnp.zeros((4, 4))).tolist() == [[0] * 4]


@pytest.mark.parametrize(
    ("scales", "error", "text"),
    [
        (jnp.zeros((4, 4), jnp.bfloat16), TypeError, "scales: expected float32, got bfloat16"),
        (jnp.zeros(4), ValueError, r"scales: expected \[..., rows, blocks\], got shape \(4,\)"),
    ],
)
def test_scales_that_are_not_packed(scales, error, text):
    with pytest.raises(error, match=f"jax_ep.pack_scales: argument {text}"):
        jax_ep.pack_scales(scales)
