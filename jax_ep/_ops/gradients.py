"""The pure ops over any backend, with their derivatives.

``plan`` is an op of its own. Along a handle, dispatch of rows and weights is linear, and so is combine
of rows and values. Each is the other's transpose, and its own tangent, and the handle is all that is
kept for these. Dispatch of rows that are quantized on their way counts as linear too: its derivative is
straight-through.

Combine with fused weights is linear in the rows and in the weights. With w, rows r and a cotangent dy,
and D for dispatch, its backward pass is one op, ``combine_vjp``::

    d_r = w · D(dy)        d_w = <r, D(dy)>

That is linear in dy, where its transpose is the tangent of combine. And it is linear in w and r
together, where it is its own transpose. So all further derivatives are these ops again.

Calls without tokens (T = 0) are answered here, outside the ops: there is nothing to communicate, and
residuals without elements crash XLA's partitioner (Shardy, jaxlib 0.11.2).
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32, Int32

from jax_ep import reference
from jax_ep._backends import calls, gpu_calls, native
from jax_ep._core.derivatives import Form, Op, ProductTangent, bilinear, call
from jax_ep._core.quantize import with_packed_scales
from jax_ep._core.types import DispatchConfig, Handle, Quantized, without_latency
from jax_ep._groups.group import Group
from jax_ep._ops import gpu_room, no_tokens
from jax_ep._ops.options import CombineOptions, DispatchOptions, PlanOptions
from jax_ep._ops.varying import match, vary_together

_BACKENDS: dict[str, types.ModuleType] = {"reference": reference, "cpu": native, "cuda": native}


def plan(options: PlanOptions, topk_idx: Int32[Array, "tokens top_k"]) -> Handle:
    """See ``jax_ep.reference.plan``."""
    (topk_idx,) = vary_together(options.group, topk_idx)
    if topk_idx.shape[0] == 0:
        handle = no_tokens.plan(options, topk_idx)
    else:
        arguments = options.fields() | {"config": without_latency(options.config)}
        unused_rows = arguments.pop("unused_rows")
        handle = _backend_of(options.group).plan(topk_idx, **arguments)
        handle = dataclasses.replace(handle, unused_rows=unused_rows, masked=options.masked)
    return match(handle, topk_idx)


def dispatch(
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    handle: Handle,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``. Derivatives: straight-through where rows are quantized."""
    if handle.topk_idx.shape[0] == 0:
        return match(no_tokens.dispatch(options, x, weights, handle), x)
    if isinstance(x, Quantized) or options.scale_format is not None:
        return call(_DispatchOf8Bits(options), (), (x, weights, handle))
    return call(_Dispatch(options), (x, weights), (handle,))


def plan_and_dispatch(
    plan_options: PlanOptions,
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """``plan`` and ``dispatch`` in one call; see ``takes_one_call``. Derivatives: as there."""
    return call(_PlanAndDispatch(plan_options, options), (), (x, weights, topk_idx))


def takes_one_call(group: Group, num_tokens: int, *, in_line: bool) -> bool:
    """Whether a dispatch makes its plan in the same call, which is in line with the program.

    So do dispatches on GPUs of one host; those in flight only in latency mode.
    """
    on_gpus = group.backend == "cuda" and not calls.spans_hosts(group)
    return on_gpus and num_tokens > 0 and in_line


def combine(options: CombineOptions, rows: Array, handle: Handle) -> Array:
    """See ``jax_ep.reference.combine``, without row weights and values."""
    if handle.topk_idx.shape[0] == 0:
        return match(jnp.zeros((0, rows.shape[1]), rows.dtype), rows)
    return call(_Combine(options), (rows, None), (handle,))[0]


def combine_weighted(
    options: CombineOptions, rows: Array, row_weights: Float32[Array, " capacity"], handle: Handle
) -> Array:
    """See ``jax_ep.reference.combine``, with row weights; keeps rows and weights for backward."""
    if handle.topk_idx.shape[0] == 0:
        return match(jnp.zeros((0, rows.shape[1]), rows.dtype), rows)
    return bilinear(_CombineWeighted(options), rows, row_weights, handle)


@dataclasses.dataclass(frozen=True)
class _Dispatch(Op):
    """Rows and weights, sent along a handle; linear in both, of which one may be None."""

    options: DispatchOptions
    is_whole: ClassVar[bool] = False

    def run(self, linear: Any, fixed: Any) -> Any:
        (x, weights), (handle,) = linear, fixed
        moved = _no_rows(len(weights), weights) if x is None else x
        options = self.options
        rows, row_weights = _backend_of(options.group).dispatch(
            moved,
            weights,
            handle,
            group=options.group,
            **_how(options, without_latency(options.config)),
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
        transpose = _Combine(CombineOptions(options.group, config, options.flight))
        return call(transpose, (d_rows, d_row_weights), fixed)


@dataclasses.dataclass(frozen=True)
class _Combine(Op):
    """Rows that come home and are summed, and values that come home; linear likewise."""

    options: CombineOptions
    is_whole: ClassVar[bool] = False

    def run(self, linear: Any, fixed: Any) -> Any:
        (rows, values), (handle,) = linear, fixed
        moved = _no_rows(handle.capacity, values) if rows is None else rows
        options = self.options
        y, home = _backend_of(options.group).combine(
            moved, None, values, handle, group=options.group, **_how(options, options.config)
        )
        return match((None if rows is None else y, home), moved)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        if cotangents[0] is None and cotangents[1] is None:
            return None, None
        options = self.options
        config = without_latency(options.config)
        transpose = DispatchOptions(options.group, config=config, flight=options.flight)
        return call(_Dispatch(transpose), cotangents, fixed)


def _no_rows(count: int, like: Array) -> Array:
    """Rows without channels, for an op that moves nothing but weights or values."""
    return match(jnp.zeros((count, 0), jnp.float32), like)


@dataclasses.dataclass(frozen=True)
class _DispatchOf8Bits(Op):
    """Dispatch of rows that are quantized, on their way or before."""

    options: DispatchOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        x, weights, handle = fixed
        options = self.options
        out = _backend_of(options.group).dispatch(
            x,
            weights,
            handle,
            group=options.group,
            scale_format=options.scale_format,
            dense_output=options.dense_output,
            **_how(options, without_latency(options.config)),
        )
        if options.packs_scales:
            groups = handle.group_sizes.shape[0] if handle.masked else 1
            out = with_packed_scales(out[0], groups), out[1]
        return match(out, x)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        return dispatch_tangents(self.options, results[0], tangents[:2], fixed[2])


@dataclasses.dataclass(frozen=True)
class _PlanAndDispatch(Op):
    """A plan, and dispatch along it, in one call on GPUs."""

    plan_options: PlanOptions
    options: DispatchOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        x, weights, topk_idx = fixed
        out = gpu_calls.dispatch(
            x,
            weights,
            topk_idx,
            **self.plan_options.fields(),
            scale_format=self.options.scale_format,
            dense_output=self.options.dense_output,
            packs_scales=self.options.packs_scales,
            flight=self.options.flight,
        )
        return match(out, x)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        rows, _, handle = results
        # Named here too, since this is what the backward pass keeps.
        handle = jax.tree.map(lambda leaf: checkpoint_name(leaf, "jax_ep.handle"), handle)
        found = dispatch_tangents(self.options, rows, tangents[:2], handle)
        return *found, jax.tree.map(lambda _: None, handle)


def dispatch_tangents(options: DispatchOptions, rows: Any, tangents: Any, handle: Handle) -> Any:
    """The tangents of the rows received and of their weights, of those of ``x`` and its weights."""
    d_x, d_weights = tangents
    plain = _Dispatch(
        dataclasses.replace(options, scale_format=None, dense_output=True, packs_scales=False)
    )
    if not isinstance(rows, Quantized):
        return call(plain, (d_x, d_weights), (handle,))
    d_rows, d_row_weights = Quantized(None, None), None  # type: ignore[arg-type]
    if jax.tree.leaves(d_x):
        like: Any = (rows.values, None) if options.packs_scales else rows  # words have no tangents
        like = Quantized(*like)
        d_rows = call(_NoDerivative(), (d_x,), (), like=like)
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
class _CombineWeighted(Form):
    """Combine as a function that is linear in rows and in their weights."""

    options: CombineOptions

    def value(self, rows: Any, row_weights: Any, fixed: Any) -> Any:
        options = self.options
        y, _ = _backend_of(options.group).combine(
            rows, row_weights, None, fixed, group=options.group, **_how(options, options.config)
        )
        return match(y, rows)

    def pull(self, rows: Any, row_weights: Any, fixed: Any, dy: Any, wanted: Any) -> Any:
        gpu_room.check_weighted_gradient_fits("combine", "rows", rows, self.options.group)
        return call(_Pull(self), (dy,), (rows, row_weights, fixed))


def combine_tangents(
    options: CombineOptions, operands: Any, tangents: Any, handle: Handle, *, like: Array
) -> Array:
    """The tangent of a combine, of those of its rows and of their weights, which may be None."""
    options = dataclasses.replace(options, config=without_latency(options.config))
    rows, row_weights = operands
    if row_weights is None:
        return call(_Combine(options), (tangents[0], None), (handle,))[0]
    op = ProductTangent(_CombineWeighted(options))
    return call(op, tangents, (rows, row_weights, handle), like=like)


@dataclasses.dataclass(frozen=True)
class _Pull(Op):
    """``combine_vjp`` as a function of ``dy``."""

    form: _CombineWeighted

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

    form: _CombineWeighted

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
    backend, config = _backend_of(options.group), without_latency(options.config)
    gradients = backend.combine_vjp(
        dy, rows, row_weights, handle, group=options.group, **_how(options, config)
    )
    return match(gradients, rows)


def _backend_of(group: Group) -> Any:
    """The module of the group's backend."""
    return _BACKENDS[group.backend]


def _how(
    options: DispatchOptions | CombineOptions, config: DispatchConfig | None
) -> dict[str, Any]:
    """The arguments of a backend's functions that change no results; XLA alone issues the reference."""
    arguments: dict[str, Any] = {"config": config}
    is_reference = _backend_of(options.group) is reference
    return arguments if is_reference else arguments | {"flight": options.flight}
