"""The form that all errors about arguments take, and checks of arguments of any op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._core.types import DispatchConfig, Quantized

ROW_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def value_error(op: str, argument: str, expected: str, got: object, fix: str) -> ValueError:
    """The one form that all errors about a value take."""
    return ValueError(_text(op, argument, expected, got, fix))


def type_error(op: str, argument: str, expected: str, got: object, fix: str) -> TypeError:
    """The one form that all errors about a type or dtype take."""
    return TypeError(_text(op, argument, expected, got, fix))


def _text(op: str, argument: str, expected: str, got: object, fix: str) -> str:
    return f"jax_ep.{op}: argument {argument}: expected {expected}, got {got}; {fix}."


def is_int(value: Any) -> bool:
    """Whether ``value`` is a Python int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_config(op: str, config: Any) -> None:
    """``config`` is None or a DispatchConfig."""
    if config is not None and not isinstance(config, DispatchConfig):
        raise type_error(
            op, "config", "a DispatchConfig or None", type(config).__name__, "wrap the settings"
        )


def check_one_of(op: str, argument: str, value: object, allowed: Sequence[object]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise value_error(op, argument, f"one of {names}", repr(value), "choose one of these")


def check_rows(op: str, argument: str, x: Any) -> None:
    """``x`` is ``[rows, hidden]`` in a row dtype, or Quantized, and rows are whole vectors."""
    if isinstance(x, Quantized):
        check_quantized(op, argument, x)
        return
    if not isinstance(x, jax.Array):
        raise type_error(
            op, argument, "a jax array or jax_ep.Quantized", type(x).__name__, "convert it first"
        )
    if x.ndim != 2:
        raise value_error(
            op,
            argument,
            "two dimensions, [tokens, hidden]",
            f"shape {x.shape}",
            "flatten the leading dimensions into tokens",
        )
    if x.dtype not in ROW_DTYPES:
        raise type_error(
            op,
            argument,
            "dtype bfloat16, float16 or float32 (or jax_ep.Quantized)",
            f"dtype {x.dtype}",
            "cast it with astype, or quantize it with jax_ep.quantize",
        )
    row_bytes = x.shape[1] * x.dtype.itemsize
    if row_bytes == 0 or row_bytes % 16:
        raise value_error(
            op,
            argument,
            "rows of a positive multiple of 16 bytes",
            f"hidden {x.shape[1]} of {x.dtype} = {row_bytes} bytes",
            f"pad hidden to a multiple of {16 // x.dtype.itemsize}",
        )


def check_quantized(op: str, argument: str, x: Any) -> None:
    """Values and scales are arrays that have the dtypes and shapes of quantized rows."""
    if not isinstance(x, Quantized):
        raise type_error(
            op, argument, "jax_ep.Quantized", type(x).__name__, "make it with jax_ep.quantize"
        )
    for name, part in x._asdict().items():
        if not isinstance(part, jax.Array | np.ndarray):
            raise type_error(
                op,
                f"{argument}.{name}",
                "an array",
                type(part).__name__,
                "make it with jax_ep.quantize",
            )
    values, scales = x
    if values.ndim != 2 or values.shape[1] == 0 or values.shape[1] % 128:
        raise value_error(
            op,
            f"{argument}.values",
            "[tokens, hidden] with hidden a positive multiple of 128",
            f"shape {values.shape}",
            "pad hidden to a multiple of 128",
        )
    if values.dtype != jnp.float8_e4m3fn:
        raise type_error(
            op,
            f"{argument}.values",
            "dtype float8_e4m3fn",
            f"dtype {values.dtype}",
            "make it with jax_ep.quantize",
        )
    blocks = (values.shape[0], values.shape[1] // 128)
    if scales.shape != blocks or scales.dtype != jnp.float32:
        raise value_error(
            op,
            f"{argument}.scales",
            f"float32 {blocks}, one for each 128 channels",
            f"{scales.dtype} {scales.shape}",
            "make it with jax_ep.quantize",
        )


def check_fp8_hidden(op: str, hidden: int) -> None:
    """Rows can be quantized: hidden is a multiple of a block of 128 channels."""
    if hidden % 128:
        raise value_error(
            op,
            "x",
            "hidden a multiple of 128 with quantization='fp8'",
            f"hidden {hidden}",
            "pad hidden to a multiple of 128, or send the rows unquantized",
        )
