"""How a dispatch quantizes rows, and in which form their scales are received."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Array

from jax_ep._core import arguments
from jax_ep._core.quantize import check_scale_format
from jax_ep._core.types import Quantized, ScaleFormat

Output = Literal["dense", "quantized"]


class Quantization(NamedTuple):
    """What ``check`` finds.

    Attributes:
        scale_format: That which the op quantizes with, or None where it does not quantize.
        packs_scales: Whether the scales received are packed.
    """

    scale_format: ScaleFormat | None
    packs_scales: bool


def check(
    op: str,
    x: Array | Quantized,
    quantization: str | None,
    output: str | None,
    scale_format: str,
) -> Quantization:
    """Raise unless these arguments of a dispatch, whose rows are checked, fit together."""
    arguments.check_one_of(op, "quantization", quantization, (None, "fp8"))
    arguments.check_one_of(op, "output", output, (None, "dense", "quantized"))
    check_scale_format(op, scale_format, ("f32", "ue8m0", "ue8m0_packed"))
    packs_scales = scale_format == "ue8m0_packed"
    if isinstance(x, Quantized):
        if output == "dense":
            raise arguments.value_error(
                op,
                "output",
                "'quantized' or None for Quantized x",
                repr(output),
                "turn the rows received into dense ones with jax_ep.dequantize",
            )
        if quantization is not None:
            raise arguments.value_error(
                op,
                "quantization",
                "None for x that is Quantized already",
                repr(quantization),
                "leave it out",
            )
        return Quantization(None, packs_scales)
    if quantization is None and output == "quantized":
        raise arguments.value_error(
            op,
            "output",
            "'dense' or None without quantization",
            repr(output),
            "pass quantization='fp8' too",
        )
    if packs_scales and output != "quantized":
        raise arguments.value_error(
            op,
            "scale_format",
            "'f32' or 'ue8m0' for rows that are received dense",
            repr(scale_format),
            "pass quantization='fp8' and output='quantized' too",
        )
    if quantization is None:
        return Quantization(None, False)
    arguments.check_fp8_hidden(op, x.shape[1])
    return Quantization("f32" if scale_format == "f32" else "ue8m0", packs_scales)
