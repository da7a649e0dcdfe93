"""Wrong settings of ops, and of casts to and from float8, raise where they are made."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jax_ep

F32, I32, E4M3 = jnp.float32, jnp.int32, jnp.float8_e4m3fn
V, T = ValueError, TypeError


@pytest.mark.parametrize(
    ("num_sms", "error", "text"),
    [
        (0, V, "expected 1 to 2147483647 or None, got 0; "),
        (2**40, V, "expected 1 to 2147483647 or None, got 1099511627776; "),
        (2.5, T, "expected a positive int or None, got 2.5; "),
        ("4", T, "expected a positive int or None, got '4'; "),
        (True, T, "expected a positive int or None, got True; "),
    ],
)
def test_number_of_sms(num_sms, error, text):
    with pytest.raises(error, match=f"jax_ep.DispatchConfig: argument num_sms: {text}"):
        jax_ep.DispatchConfig(num_sms=num_sms)


def test_dispatch_config():
    with pytest.raises(
        ValueError, match="mode: expected 'auto', 'throughput' or 'latency', got 'fast'"
    ):
        jax_ep.DispatchConfig(mode="fast")  # type: ignore[arg-type]
    assert hash(jax_ep.DispatchConfig(num_sms=8)) == hash(jax_ep.DispatchConfig(num_sms=8))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (((4, 128), I32, "f32"), T, "argument x: expected bfloat16, float16 or float32, got int32"),
        (((4, 100), F32, "f32"), V, r"hidden a multiple of 128, got shape \(4, 100\); pad"),
        (((128,), F32, "f32"), V, r"expected \[rows, hidden\] .*, got shape \(128,\)"),
        (((4, 128), F32, "e8m0"), V, "scale_format: expected 'f32' or 'ue8m0', got 'e8m0'"),
    ],
)
def test_quantize(call, error, text):
    shape, dtype, scale_format = call
    with pytest.raises(error, match="jax_ep.quantize: .*" + text):
        jax_ep.quantize(jnp.zeros(shape, dtype), scale_format=scale_format)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (((4, 128), (4, 2), F32), V, r"scales"),
        (((4, 128), (4, 1), I32), T, "dtype"),
    ],
)
def test_dequantize(call, error, text):
    values, scales, dtype = call
    q = jax_ep.Quantized(jnp.zeros(values, E4M3), jnp.zeros(scales, F32))
    with pytest.raises(error, match="jax_ep.dequantize: .*" + text):
        jax_ep.dequantize(q, dtype)
