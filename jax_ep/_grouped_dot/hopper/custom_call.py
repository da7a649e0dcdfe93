"""Kernels as custom calls, each of them lowered once in a process and the same in all programs.

Pallas lowers a kernel anew for each program, which takes most of a second. It also writes a number
into the kernel that counts the kernels of the process. jaxlib tells kernels apart by their content,
so because of that number it compiles the same kernel in two programs twice, for a second or more
each. And JAX's persistent compilation cache does not find a program if another kernel was lowered
before it. So this module lowers a kernel once, apart from any program, and removes the number.
Programs get copies.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.interpreters import mlir

from jax_ep._grouped_dot.hopper.pipeline import plgpu

_COUNTED = "mosaic_gpu.dump_basename"  # names files of dumps; jaxlib makes one where there is none


@runtime_checkable
class Kernel(Hashable, Protocol):
    """A kernel; equal ones have equal bodies."""

    @property
    def body(self) -> Callable[..., None]:
        """What each block of the GPU runs, given the operands and the result."""


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """How a program calls a kernel.

    Attributes:
        target: The name of the FFI handler.
        attributes: What the handler is given; the kernel itself is one of them.
    """

    target: str
    attributes: tuple[tuple[str, Any], ...]


def pallas_kernel(
    kernel: Kernel, blocks: int, outs: tuple[jax.ShapeDtypeStruct, ...]
) -> Callable[..., Any]:
    """A function that launches ``kernel`` in that many blocks, for Pallas to lower."""
    return plgpu.kernel(
        kernel.body,
        out_type=outs,
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


@functools.cache
def custom_call(
    kernel: Kernel,
    blocks: int,
    outs: tuple[jax.ShapeDtypeStruct, ...],
    *operands: jax.ShapeDtypeStruct,
) -> CustomCall | None:
    """The custom call that Pallas lowers a kernel to; None if it lowers it to anything more."""
    function = jax.jit(pallas_kernel(kernel, blocks, outs))

    def lower() -> Any:
        with jax.enable_x64(False):  # the kernels' own numbers are int32
            return function.trace(*operands).lower(lowering_platforms=("cuda",)).compiler_ir()

    # In a thread of its own, which knows neither the mesh nor the settings of the program around it.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        call = _sole_call(thread.submit(lower).result())
    if call is None:
        return None
    attributes = {item.name: _value(item.attr) for item in _given(call)}
    if attributes.keys() >= {"module", "kernel_hash"}:
        module = attributes["module"] = _uncounted(attributes["module"], call.context)
        attributes["kernel_hash"] = hashlib.sha256(module).digest()
    target = call.attributes["call_target_name"].value
    return CustomCall(target, tuple(attributes.items()))


def _sole_call(module: Any) -> Any:
    """The custom call that a StableHLO module consists of; None if it has anything else."""
    found = []
    for function in module.body.operations:
        (block,) = function.regions[0].blocks
        call, *rest = block.operations
        if len(rest) != 1 or list(call.operands) != list(block.arguments):
            return None
        if list(rest[0].operands) != list(call.results):
            return None
        if call.name == "stablehlo.custom_call":
            found.append(call)
    return found[0] if len(found) == 1 and _given(found[0]) is not None else None


def _given(call: Any) -> Any:
    """The MLIR dictionary that a custom call gives its handler; None if it has another form."""
    for name in ("mhlo.backend_config", "backend_config"):
        if name in call.attributes and isinstance(call.attributes[name], mlir.ir.DictAttr):
            return call.attributes[name]
    return None


def _value(attribute: Any) -> Any:
    """An attribute as a Python value, which has no MLIR context."""
    if isinstance(attribute, mlir.ir.StringAttr):
        return attribute.value_bytes
    return attribute.value


def _uncounted(module: bytes, context: Any) -> bytes:
    """A module of Mosaic GPU without the number that Pallas gave it."""
    with context:
        context.allow_unregistered_dialects = True  # versions of the format use other dialects
        parsed = mlir.ir.Module.parse(module)
        if _COUNTED not in parsed.operation.attributes:
            return module
        del parsed.operation.attributes[_COUNTED]
        written = io.BytesIO()
        parsed.operation.write_bytecode(written, desired_version=0)
        return written.getvalue()
