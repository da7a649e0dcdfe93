"""8-bit rows: float8_e4m3fn values with one float32 scale per block of 128 channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_ep._core import arguments
from jax_ep._core.numerics import keep, round_to
from jax_ep._core.types import Quantized, ScaleFormat

BLOCK = 128
MAX_E4M3 = 448.0
# The least magnitude that a scale is made for, so that scale and 1 / scale are finite and normal.
_SMALLEST_AMAX = 1e-30


def quantize(x: Float[Array, "rows hidden"], *, scale_format: ScaleFormat = "f32") -> Quantized:
    """Round rows to float8_e4m3fn, block by block of 128 channels.

    The scale of a block is its largest magnitude over 448, the largest float8_e4m3fn, so that the
    block uses the whole range (the scheme of DeepSeek-V3, arXiv:2412.19437, section 3.3)::

        scale = max(max(|x|), 1e-30) * f32(1 / 448)
        value = float8_e4m3fn(clip(x * (1 / scale), -448, 448))      # to nearest, ties to even

    Args:
        x: ``[rows, hidden]`` bf16, f16 or f32; hidden is a multiple of 128.
        scale_format: "f32", or "ue8m0" to round each scale up to a power of two, as block-scaled
            matmuls with 8-bit exponent scales need; the scales are float32 either way.

    Returns:
        The quantized rows: values ``[rows, hidden]``, scales ``[rows, hidden / 128]``.

    Raises:
        TypeError: for another dtype.
        ValueError: for another rank, hidden size or scale format.
    """
    _check_rows("quantize", x)
    check_scale_format("quantize", scale_format)
    rows, hidden = x.shape
    x = lax.optimization_barrier(x)  # so that the way x was computed does not matter
    blocks = x.astype(jnp.float32).reshape(rows, hidden // BLOCK, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1)
    # XLA's vectorised maximum on CPU loses NaNs.
    amax = jnp.where(jnp.isnan(blocks).any(axis=-1), jnp.nan, amax)
    inverse_max = jnp.float32(1.0 / MAX_E4M3)
    scales = lax.optimization_barrier(jnp.maximum(amax, jnp.float32(_SMALLEST_AMAX))) * inverse_max
    if scale_format == "ue8m0":
        scales = _round_up_to_power_of_two(scales)
    scales = lax.optimization_barrier(scales)
    inverse = lax.optimization_barrier(1.0 / scales)
    clipped = jnp.clip(blocks * inverse[..., None], -MAX_E4M3, MAX_E4M3)
    values = lax.optimization_barrier(clipped).astype(jnp.float8_e4m3fn)
    return Quantized(values.reshape(rows, hidden), scales)


def dequantize(q: Quantized, dtype: DTypeLike = jnp.bfloat16) -> Float[Array, "rows hidden"]:
    """``values * scales``, multiplied in float32 and rounded to ``dtype``.

    Args:
        q: Values ``[rows, hidden]`` and scales ``[rows, hidden / 128]``.
        dtype: bf16, f16 or f32.

    Returns:
        ``[rows, hidden]`` in ``dtype``.

    Raises:
        TypeError: for another dtype of the values or the result.
        ValueError: for shapes that do not fit together.
    """
    arguments.check_quantized("dequantize", "q", q)
    if jnp.dtype(dtype) not in arguments.ROW_DTYPES:
        raise arguments.type_error(
            "dequantize",
            "dtype",
            "dtype bfloat16, float16 or float32",
            f"dtype {jnp.dtype(dtype)}",
            "choose one of these and cast the rows afterwards",
        )
    rows, hidden = q.values.shape
    blocks = q.values.astype(jnp.float32).reshape(rows, hidden // BLOCK, BLOCK)
    scales = q.scales[..., None]
    # A scale is positive, so its sign bit is a zero that the compiler does not know.
    sign = lax.shift_right_logical(lax.bitcast_convert_type(scales, jnp.int32), 31)
    products = keep(blocks * scales, lax.stop_gradient(sign)).reshape(rows, hidden)
    return round_to(products, dtype)


def pack_scales(
    scales: Float[Array, "*experts rows blocks"],
) -> Int32[Array, "*experts words lines"]:
    """Scales of format "ue8m0" as block-scaled matmuls of Blackwell GPUs take them: 8 bits each.

    Such a scale is a power of two, so its exponent says all. Four of a row become a word, the first in
    the lowest byte, and the words of consecutive rows lie side by side, as DeepGEMM
    (https://github.com/deepseek-ai/DeepGEMM) takes them from DeepEP. For four rows of two blocks::

        scales = [[1, 2], [0.5, 1], [1, 1], [4, 1]]             # exponents 127 + log2(scale)
        words  = [[0x807f, 0x7f7e, 0x7f7f, 0x7f81]]

    XLA does this in one kernel, which it may fuse with what reads the words. A ``dispatch`` with
    ``scale_format="ue8m0_packed"`` gives the words itself, in latency mode on GPUs without that kernel.

    Args:
        scales: ``[rows, hidden / 128]`` float32 of ``quantize`` or ``dispatch`` with
            ``scale_format="ue8m0"``; ``[L, S, hidden / 128]`` in layout "masked". Zeros, as unused rows
            have, become zeros. Of other numbers only the exponent is kept.

    Returns:
        ``[⌈hidden / 512⌉, roundup(rows, 4)]`` int32, or with ``[L, ...]`` before it. What is added at
        the ends is zero.

    Raises:
        TypeError: for another dtype.
        ValueError: for fewer than two dimensions.
    """
    if jnp.result_type(scales) != jnp.float32:
        raise arguments.type_error(
            "pack_scales",
            "scales",
            "float32",
            f"{jnp.result_type(scales)}",
            "pass the scales of a Quantized, unchanged",
        )
    if scales.ndim < 2:
        raise arguments.value_error(
            "pack_scales", "scales", "[..., rows, blocks]", f"shape {scales.shape}", "add the rows"
        )
    *outer, rows, blocks = scales.shape
    bits = lax.bitcast_convert_type(scales, jnp.uint32)
    exponents = (bits >> 23) & 0xFF
    more = [(0, 0)] * len(outer) + [(0, -rows % 4), (0, -blocks % 4)]
    exponents = jnp.pad(exponents, more).reshape(*outer, rows + -rows % 4, -1, 4)
    words = (exponents << jnp.arange(0, 32, 8, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(jnp.swapaxes(words, -1, -2), jnp.int32)


def with_packed_scales(q: Quantized, groups: int) -> Quantized:
    """The rows with packed scales ``[groups · words, lines]``, each of ``groups`` groups by itself."""
    words = pack_scales(q.scales.reshape(groups, -1, q.scales.shape[1]))
    return Quantized(q.values, words.reshape(-1, words.shape[-1]))


def check_scale_format(
    op: str, scale_format: str, formats: Sequence[str] = ("f32", "ue8m0")
) -> None:
    """Raise unless ``scale_format`` is one of ``formats``."""
    if scale_format not in formats:
        wanted = f"{', '.join(map(repr, formats[:-1]))} or {formats[-1]!r}"
        raise ValueError(
            f"jax_ep.{op}: argument scale_format: expected {wanted}, got {scale_format!r}; "
            "choose one of these."
        )


def _check_rows(op: str, x: Any) -> None:
    if not isinstance(x, jax.Array | np.ndarray):
        raise arguments.type_error(op, "x", "an array", type(x).__name__, "convert it first")
    if x.ndim != 2 or x.shape[1] % BLOCK:
        raise ValueError(
            f"jax_ep.{op}: argument x: expected [rows, hidden] with hidden a multiple of {BLOCK}, "
            f"got shape {x.shape}; pad the hidden size."
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"jax_ep.{op}: argument x: expected bfloat16, float16 or float32, got {x.dtype}."
        )


def _round_up_to_power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The least power of two that is not below x (x positive and normal); NaN stays NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded)
