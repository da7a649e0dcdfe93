"""``jax.shard_map`` inside another ``jax.shard_map``, with gradients.

JAX (0.10.2 to 0.12.0) can run such a nest but cannot cut it in two, as ``grad``, ``scan`` and
``jax.checkpoint`` do: what one half keeps for the other leaves the inner ``shard_map`` with a spec over
all manual axes, those of the outer one too, which the lowering refuses.

So here the inner ``shard_map`` gets a custom gradient. Its forward pass returns what the backward pass
needs, with specs over the inner axes alone, and the backward pass enters a ``shard_map`` of its own.
Both are made in the same way, so second derivatives work as far as those of the function do. And each
stands inside a primitive, so that no transformation of JAX looks into it. To ``jax.checkpoint`` a
nested layer is one op, whose names a policy does not see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from jax_ep import _compat
from jax_ep._core.only_reverse import only_reverse

_NO_FORWARD_MODE = (
    "jax_ep.moe: inside a shard_map over other axes the layer has no forward mode (jax.jvp, "
    "jax.linearize, jax.jacfwd). Take reverse mode (jax.grad, jax.vjp; for products with a Hessian, "
    "jax.grad of the product of jax.grad with a vector), or call the layer outside shard_map."
)
Arrays = tuple[jax.Array, ...]
Specs = tuple[PartitionSpec, ...]


_whole_p = Primitive("jax_ep_nested")
_whole_p.multiple_results = True


@_whole_p.def_impl
def _run_whole(*args: jax.Array, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    return jaxpr_as_fun(jaxpr)(*args)


@_whole_p.def_abstract_eval
def _abstract_whole(*_: Any, jaxpr: ClosedJaxpr) -> list[Any]:
    return jaxpr.out_avals


def _lower_whole(ctx: mlir.LoweringRuleContext, *args: Any, jaxpr: ClosedJaxpr) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *args)


def _batch_whole(args: Any, dims: Any, *, jaxpr: ClosedJaxpr) -> tuple[Any, Any]:
    batched = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(dims)))(*args)
    return _whole_p.bind(*args, jaxpr=batched), (0,) * len(batched.out_avals)


_compat.register_lowering_of_each(_whole_p, _lower_whole)
batching.primitive_batchers[_whole_p] = _batch_whole


def nested_shard_map(
    f: Callable[..., Any], *, axes: Sequence[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``f`` over ``axes`` of the mesh of the enclosing ``shard_map``; reverse mode works.

    Args:
        f: A function of pytrees of arrays to a pytree of arrays, for one device. It closes over no
            traced value.
        axes: The axes to enter; the enclosing ``shard_map`` entered the others.
        in_specs: A tuple with a pytree of specs for each argument, of the same structure as it.
        out_specs: A pytree of specs, of the same structure as the result.

    Returns:
        A function of arrays that are whole over ``axes``. Where a program needs forward mode
        (``jax.jvp``) through it, lowering is a TypeError.
    """
    flat_out, out_tree = jax.tree.flatten(out_specs, is_leaf=_is_spec)

    def call(*args: Any) -> Any:
        leaves, in_tree = jax.tree.flatten(args)
        leaves = [only_reverse(x, _NO_FORWARD_MODE) if _is_smooth(x) else x for x in leaves]
        together = frozenset().union(*map(_compat.varying_axes, leaves))
        inner = _Inner(
            lambda *leaves: tuple(jax.tree.leaves(f(*jax.tree.unflatten(in_tree, leaves)))),
            tuple(axes),
            tuple(jax.tree.leaves(in_specs, is_leaf=_is_spec)),
            tuple(flat_out),
            (together,) * len(leaves),
        )
        return jax.tree.unflatten(out_tree, _with_gradient(inner)(*leaves))

    return call


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _is_smooth(x: Any) -> bool:
    """Whether ``x`` has a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True, eq=False)
class _Inner:
    """What an inner ``shard_map`` runs.

    Attributes:
        f: A function of arrays to a tuple of arrays.
        axes: The axes that it enters.
        in_specs: The spec of each argument.
        out_specs: The spec of each result.
        varying: For each argument, the outer axes that it is cast to vary over.
    """

    f: Callable[..., Arrays]
    axes: tuple[str, ...]
    in_specs: Specs
    out_specs: Specs
    varying: tuple[frozenset[str], ...]

    def enter(self, fun: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
        """``fun`` of the same arguments, inside ``shard_map``."""

        def run(*args: jax.Array) -> Any:
            pairs = zip(args, self.varying, strict=True)
            args = tuple(_compat.cast_varying(arg, axes) for arg, axes in pairs)
            mapped = jax.shard_map(
                fun, in_specs=self.in_specs, out_specs=out_specs, axis_names=set(self.axes)
            )
            return tuple(_whole_p.bind(*args, jaxpr=jax.make_jaxpr(mapped)(*args)))

        return run


@dataclasses.dataclass(frozen=True)
class _Kept:
    """How one array that the pullback holds gets to the backward pass.

    Attributes:
        argument: Its position, if it is an argument as it stands. Such an array is not copied: in a
            loop, weights are kept once and not once for each step.
        axes: Else the inner axes over which it varies. Along these its copies are stacked.
        empty: Its shape and dtype if it has no elements. Such arrays crash XLA's partitioner as
            inputs of ``shard_map``, so the backward pass makes them anew.
    """

    argument: int | None = None
    axes: tuple[str, ...] = ()
    empty: tuple[tuple[int, ...], Any] | None = None

    @property
    def travels(self) -> bool:
        """Whether the forward pass returns it."""
        return self.argument is None and self.empty is None

    @property
    def spec(self) -> PartitionSpec:
        """The spec with which it leaves one ``shard_map`` and enters the other."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()

    @classmethod
    def of(cls, leaf: jax.Array, args: Arrays, axes: tuple[str, ...]) -> _Kept:
        """How ``leaf`` is kept, inside a ``shard_map`` over ``axes`` of a function of ``args``."""
        for position, arg in enumerate(args):
            if leaf is arg:
                return cls(argument=position)
        if leaf.size == 0:
            return cls(empty=(leaf.shape, leaf.dtype))
        varying = _compat.varying_axes(leaf)
        return cls(axes=tuple(name for name in axes if name in varying))


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """What is known once the forward pass has been traced.

    Attributes:
        tree: The structure of the pullback, whose leaves are the arrays that it holds.
        kept: How each of these is kept.
        smooth_in: Positions of the arguments that have a gradient.
        smooth_out: Likewise, of the results.
    """

    tree: Any
    kept: tuple[_Kept, ...]
    smooth_in: tuple[int, ...]
    smooth_out: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["saved", "travelled"],
    meta_fields=["pullback", "own_axes", "out_axes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Residuals:
    """What the forward pass hands to the backward pass.

    Attributes:
        saved: Arguments that the pullback holds, ascending.
        travelled: The other arrays that it holds.
        pullback: The rest of the pullback.
        own_axes: The outer axes that each argument varies over before it is cast.
        out_axes: Likewise, of each result.
    """

    saved: Arrays
    travelled: Arrays
    pullback: _Pullback
    own_axes: tuple[frozenset[str], ...]
    out_axes: tuple[frozenset[str], ...]


def _with_gradient(inner: _Inner) -> Callable[..., Arrays]:
    """``inner`` as a function of arrays, whose backward pass enters a ``shard_map`` of its own."""

    @jax.custom_vjp
    def call(*args: jax.Array) -> Arrays:
        return inner.enter(inner.f, inner.out_specs)(*args)

    def forward(*args: jax.Array) -> tuple[Arrays, _Residuals]:
        # shard_map needs the specs of the results before it traces a function, so it is traced
        # twice.
        found = _trace(inner, args)
        specs = tuple(how.spec for how in found.kept if how.travels)
        latest: list[_Pullback] = []
        with_pullback = dataclasses.replace(
            inner, f=_with_pullback(inner, latest), out_specs=inner.out_specs + specs
        )
        # This one has a gradient too. Second derivatives need it. And jax.checkpoint would look for
        # values to save inside a plain shard_map, and these would leave it with a spec over all
        # axes again.
        results = _with_gradient(with_pullback)(*args)
        outs, travelled = results[: len(inner.out_specs)], results[len(inner.out_specs) :]
        [pullback] = latest
        if pullback.kept != found.kept:
            raise AssertionError("two traces of one function keep different arrays")
        residuals = _Residuals(
            saved=tuple(args[i] for i in _forwarded(pullback)),
            travelled=travelled,
            pullback=pullback,
            own_axes=tuple(map(_compat.varying_axes, args)),
            out_axes=tuple(map(_compat.varying_axes, outs)),
        )
        return outs, residuals

    def backward(residuals: _Residuals, cotangents: Arrays) -> tuple[jax.Array | None, ...]:
        pullback, kept = residuals.pullback, residuals.pullback.kept
        forwarded = _forwarded(pullback)
        travelling = [how.spec for how in kept if how.travels]

        def pull_back(*args: jax.Array) -> Arrays:
            saved = dict(zip(forwarded, args, strict=False))
            travelled = iter(args[len(forwarded) :])
            leaves = [_bring(how, saved, travelled) for how in kept]
            return tuple(jax.tree.unflatten(pullback.tree, leaves)(tuple(travelled)))

        smooth = [
            _compat.cast_varying(cotangents[i], residuals.out_axes[i]) for i in pullback.smooth_out
        ]
        in_specs = [inner.in_specs[i] for i in forwarded] + travelling
        in_specs += [inner.out_specs[i] for i in pullback.smooth_out]
        varying = [inner.varying[i] for i in forwarded]
        varying += [frozenset()] * (len(travelling) + len(smooth))
        back = _Inner(
            pull_back,
            inner.axes,
            tuple(in_specs),
            tuple(inner.in_specs[i] for i in pullback.smooth_in),
            tuple(varying),
        )
        found = _with_gradient(back)(*residuals.saved, *residuals.travelled, *smooth)
        gradients: list[jax.Array | None] = [None] * len(inner.in_specs)
        for i, gradient in zip(pullback.smooth_in, found, strict=True):
            # The transpose of the cast; outside, since the inner shard_map cannot sum over outer axes.
            cast_over = _compat.varying_axes(gradient) - residuals.own_axes[i]
            gradients[i] = lax.psum(gradient, tuple(sorted(cast_over))) if cast_over else gradient
        return tuple(gradients)

    call.defvjp(forward, backward)
    return call


def _trace(inner: _Inner, args: Arrays) -> _Pullback:
    """The pullback of the forward pass, found by tracing it."""
    latest: list[_Pullback] = []
    with_pullback = _with_pullback(inner, latest)
    outs_only = lambda *args: with_pullback(*args)[: len(inner.out_specs)]  # noqa: E731
    jax.eval_shape(inner.enter(outs_only, inner.out_specs), *args)
    return latest[0]


def _with_pullback(inner: _Inner, latest: list[_Pullback]) -> Callable[..., Arrays]:
    """A function that returns the results, then the arrays of the pullback that travel.

    While it is traced it writes the rest of the pullback to ``latest``.
    """

    def run(*args: jax.Array) -> Arrays:
        smooth_in = tuple(i for i, arg in enumerate(args) if _is_smooth(arg))

        def of_smooth(*values: jax.Array) -> tuple[Arrays, Arrays]:
            merged = list(args)
            for i, value in zip(smooth_in, values, strict=True):
                merged[i] = value
            outs = inner.f(*merged)
            return tuple(filter(_is_smooth, outs)), outs

        _, pull, outs = jax.vjp(of_smooth, *(args[i] for i in smooth_in), has_aux=True)
        leaves, tree = jax.tree.flatten(pull)
        kept = tuple(_Kept.of(leaf, args, inner.axes) for leaf in leaves)
        smooth_out = tuple(i for i, out in enumerate(outs) if _is_smooth(out))
        latest[:] = [_Pullback(tree, kept, smooth_in, smooth_out)]
        pairs = zip(leaves, kept, strict=True)
        return *outs, *(leaf[None] for leaf, how in pairs if how.travels)

    return run


def _forwarded(pullback: _Pullback) -> list[int]:
    """Positions of the arguments that the pullback holds, ascending."""
    return sorted({how.argument for how in pullback.kept if how.argument is not None})


def _bring(how: _Kept, saved: dict[int, jax.Array], travelled: Iterator[jax.Array]) -> jax.Array:
    """One array of the pullback, inside the ``shard_map`` of the backward pass."""
    if how.argument is not None:
        return saved[how.argument]
    if how.empty is not None:
        return jnp.zeros(*how.empty)
    return next(travelled)[0]
