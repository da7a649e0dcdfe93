"""Dispatch and combine as ops that know their derivatives.

Along a handle, dispatch of rows and weights is linear, and so is combine of rows and values. Each is
the other's transpose, and its own tangent. Dispatch of rows that are quantized on their way counts as
linear too: its derivative is straight-through.

Combine with fused weights is linear in the rows and in the weights. With w, rows r and a cotangent dy,
and D for dispatch, its backward pass is one op, ``combine_vjp``::

    d_r = w · D(dy)        d_w = <r, D(dy)>

That is linear in dy, where its transpose is the tangent of combine. And it is linear in w and r
together, where it is its own transpose. So all further derivatives are these ops again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jax_ep._backends import native
from jax_ep._core.derivatives import Form, Op, ProductTangent, call
from jax_ep._core.types import Handle, Quantized, without_latency
from jax_ep._ops import gpu_room
from jax_ep._ops.options import (
    CombineOptions,
    DispatchOptions,
    PlanOptions,
    backend_of,
    how,
    match,
)


@dataclasses.dataclass(frozen=True)
class Dispatch(Op):
    """Rows and weights, sent along a handle; linear in both, of which one may be None."""

    options: DispatchOptions
    is_whole: ClassVar[bool] = False

    def run(self, linear: Any, fixed: Any) -> Any:
        (x, weights), (handle,) = linear, fixed
        moved = _no_rows(len(weights), weights) if x is None else x
        options = self.options
        rows, row_weights = backend_of(options.group).dispatch(
            moved,
            weights,
            handle,
            group=options.group,
            **how(options, without_latency(options.config)),
        )
        return match((None if x is None else rows, row_weights), moved)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        (d_rows, d_row_weights), (handle,) = cotangents, fixed
        if d_rows is None and d_row_weights is None:
            return None, None
        options = self.options
        if d_rows is not None:
            what = "for gradients on GPUs"
            gpu_room.check_sums_fit("dispatch", "x", d_rows, handle.layout, options.group, what)
        config = without_latency(options.config)
        transpose = Combine(CombineOptions(options.group, config, options.flight))
        return call(transpose, (d_rows, d_row_weights), fixed)


@dataclasses.dataclass(frozen=True)
class Combine(Op):
    """Rows that come home and are summed, and values that come home; linear likewise."""

    options: CombineOptions
    is_whole: ClassVar[bool] = False

    def run(self, linear: Any, fixed: Any) -> Any:
        (rows, values), (handle,) = linear, fixed
        moved = _no_rows(handle.capacity, values) if rows is None else rows
        options = self.options
        y, home = backend_of(options.group).combine(
            moved, None, values, handle, group=options.group, **how(options, options.config)
        )
        return match((None if rows is None else y, home), moved)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        if cotangents[0] is None and cotangents[1] is None:
            return None, None
        options = self.options
        config = without_latency(options.config)
        transpose = DispatchOptions(options.group, config=config, flight=options.flight)
        return call(Dispatch(transpose), cotangents, fixed)


def _no_rows(count: int, like: Array) -> Array:
    """Rows without channels, for an op that moves nothing but weights or values."""
    return match(jnp.zeros((count, 0), jnp.float32), like)


@dataclasses.dataclass(frozen=True)
class DispatchOf8Bits(Op):
    """Dispatch of rows that are quantized, on their way or before."""

    options: DispatchOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        x, weights, handle = fixed
        options = self.options
        out = backend_of(options.group).dispatch(
            x,
            weights,
            handle,
            group=options.group,
            scale_format=options.scale_format,
            dense_output=options.dense_output,
            **how(options, without_latency(options.config)),
        )
        return match(out, x)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        return _tangents(self.options, results[0], tangents[:2], fixed[2])


@dataclasses.dataclass(frozen=True)
class PlanAndDispatch(Op):
    """A plan, and dispatch along it, in one launch of latency mode."""

    plan_options: PlanOptions
    options: DispatchOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        x, weights, topk_idx = fixed
        out = native.latency_dispatch(
            x,
            weights,
            topk_idx,
            **self.plan_options.fields(),
            scale_format=self.options.scale_format,
            dense_output=self.options.dense_output,
            flight=self.options.flight,
        )
        return match(out, x)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        rows, _, handle = results
        # Named here too, since this is what the backward pass keeps.
        handle = jax.tree.map(lambda leaf: checkpoint_name(leaf, "jax_ep.handle"), handle)
        found = _tangents(self.options, rows, tangents[:2], handle)
        return *found, jax.tree.map(lambda _: None, handle)


def _tangents(options: DispatchOptions, rows: Any, tangents: Any, handle: Handle) -> Any:
    """The tangents of the rows received and of their weights, of those of ``x`` and its weights."""
    d_x, d_weights = tangents
    plain = Dispatch(dataclasses.replace(options, scale_format=None, dense_output=True))
    if not isinstance(rows, Quantized):
        return call(plain, (d_x, d_weights), (handle,))
    d_rows, d_row_weights = Quantized(None, None), None  # type: ignore[arg-type]
    if jax.tree.leaves(d_x):
        d_rows = call(_NoDerivative(), (d_x,), (), like=rows)
    if d_weights is not None:
        _, d_row_weights = call(plain, (None, d_weights), (handle,))
    return d_rows, d_row_weights


@dataclasses.dataclass(frozen=True)
class _NoDerivative(Op):
    """Stands for the tangents of ``Quantized`` rows: whoever needs them gets an error."""

    def run(self, linear: Any, fixed: Any) -> Any:
        raise TypeError(
            "jax_ep.dispatch: Quantized rows have no gradient (a float8_e4m3fn cotangent would be "
            "useless). Pass x as bfloat16, float16 or float32 with quantization='fp8' and "
            "output='dense', whose gradient is straight-through; or cut the gradient with "
            "jax.lax.stop_gradient."
        )

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        self.run(linear, fixed)


@dataclasses.dataclass(frozen=True)
class CombineWeighted(Form):
    """Combine as a function that is linear in rows and in their weights."""

    options: CombineOptions

    def value(self, rows: Any, row_weights: Any, fixed: Any) -> Any:
        options = self.options
        y, _ = backend_of(options.group).combine(
            rows, row_weights, None, fixed, group=options.group, **how(options, options.config)
        )
        return match(y, rows)

    def pull(self, rows: Any, row_weights: Any, fixed: Any, dy: Any, wanted: Any) -> Any:
        gpu_room.check_weighted_gradient_fits("combine", "rows", rows, self.options.group)
        return call(_Pull(self), (dy,), (rows, row_weights, fixed))


@dataclasses.dataclass(frozen=True)
class _Pull(Op):
    """``combine_vjp`` as a function of ``dy``."""

    form: CombineWeighted

    def run(self, linear: Any, fixed: Any) -> Any:
        (dy,), (rows, row_weights, handle) = linear, fixed
        return _combine_vjp(self.form.options, dy, rows, row_weights, handle)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        return call(_PullOfBoth(self.form), tangents[:2], (linear[0], fixed[2]), like=results)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        return (call(ProductTangent(self.form), cotangents, fixed, like=linear[0]),)


@dataclasses.dataclass(frozen=True)
class _PullOfBoth(Op):
    """``combine_vjp`` as a function of rows and weights together."""

    form: CombineWeighted

    def run(self, linear: Any, fixed: Any) -> Any:
        dy, handle = fixed
        return _combine_vjp(self.form.options, dy, *_complete(linear, dy, handle), handle)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        dy, handle = fixed
        about = (*_complete(linear, dy, handle), handle)
        return call(_Pull(self.form), tangents[:1], about, like=results)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        return call(self, cotangents, fixed)


def _complete(both: Any, dy: Array, handle: Handle) -> tuple[Array, Array]:
    """Rows and weights, zeros where they are None."""
    rows, row_weights = both
    if rows is None:
        rows = match(jnp.zeros((handle.capacity, dy.shape[1]), dy.dtype), dy)
    if row_weights is None:
        row_weights = match(jnp.zeros((handle.capacity,), jnp.float32), dy)
    return rows, row_weights


def _combine_vjp(
    options: CombineOptions, dy: Array, rows: Array, row_weights: Array, handle: Handle
) -> Any:
    backend, config = backend_of(options.group), without_latency(options.config)
    gradients = backend.combine_vjp(
        dy, rows, row_weights, handle, group=options.group, **how(options, config)
    )
    return match(gradients, rows)
