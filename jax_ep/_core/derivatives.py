"""Ops with derivatives of their own: forward mode, reverse mode, and both of any order.

``jax.custom_vjp`` has no forward mode, and the transpose of what ``jax.custom_jvp`` computes is JAX's
choice, not ours. So an op here says two things about itself. In some of its operands it may be linear;
then it knows its *transpose*, which is made of ops again. In the others it knows its *tangent*, which
is an op that is linear in their tangents. JAX gets reverse mode from these two: it computes the
tangents' op backwards, by its transpose. So a backward pass runs the transposes and nothing else.

To JAX an op is one primitive, which holds a program. Under ``vmap`` there is one op for each element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jax_ep import _compat
from jax_ep._core.batching import one_by_one


class Op:
    """What an op computes, and its derivatives; hashable, a frozen dataclass of its options.

    Operands and results are pytrees of arrays. ``linear`` is a tuple of the operands that the op is
    linear in, and ``fixed`` one of the others. An operand may be None, a pytree without leaves. Of
    tangents and cotangents, None also stands for zeros.
    """

    # Whether all results depend on each linear operand. Then its transpose gets no None.
    is_whole: ClassVar[bool] = True

    def run(self, linear: Any, fixed: Any) -> Any:
        """The results. Linear operands that are None count as zeros, and give no result alone."""
        raise NotImplementedError

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        """Tangents of the results, for those of ``fixed``; where all are integers there are none."""
        raise NotImplementedError

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        """A cotangent for each linear operand, which is an abstract value here, or None."""
        raise NotImplementedError


def call(op: Op, linear: Any, fixed: Any, *, like: Any = None) -> Any:
    """The results of ``op``.

    Args:
        op: The op.
        linear: The operands that it is linear in.
        fixed: The others.
        like: What the results look like, if that is known: arrays or abstract values. Then the op is
            traced only where it runs.
    """
    tree: Any
    leaves, tree = jax.tree.flatten((linear, fixed))
    jaxpr: ClosedJaxpr | None = None
    if like is None:
        jaxpr, like = jax.make_jaxpr(_flat(op, tree), return_shape=True)(*leaves)
        avals = jaxpr.out_avals
    else:
        avals = [_compat.aval_of(x) for x in jax.tree.leaves(like)]
    out_tree: Any = jax.tree.structure(like)
    out = _op_p.bind(*leaves, op=op, tree=tree, out_tree=out_tree, avals=tuple(avals), jaxpr=jaxpr)
    return out_tree.unflatten(out)


def fill(tangents: Any, like: Any) -> Any:
    """``tangents``, with zeros where they are None; those of ``like``, which may have None itself."""
    tree: Any
    leaves, tree = jax.tree.flatten(like)
    found = [None] * len(leaves) if tangents is None else tree.flatten_up_to(tangents)
    pairs = zip(found, leaves, strict=True)
    return tree.unflatten([_zeros(x) if t is None else t for t, x in pairs])


def _zeros(like: Any) -> jax.Array:
    return _compat.cast_varying(jnp.zeros(like.shape, like.dtype), _compat.varying_axes(like))


def _flat(op: Op, tree: Any) -> Callable[..., Any]:
    return lambda *leaves: op.run(*tree.unflatten(leaves))


def _run(*leaves: Any, op: Op, tree: Any, jaxpr: ClosedJaxpr | None, **_: Any) -> list[Any]:
    if jaxpr is not None:
        return jaxpr_as_fun(jaxpr)(*leaves)
    return jax.tree.leaves(_flat(op, tree)(*leaves))


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
    return mlir.lower_fun(_run, multiple_results=True)(ctx, *operands, **params)


def _batch(
    operands: Sequence[Any], dims: Sequence[int | None], *, op: Op, tree: Any, **_: Any
) -> tuple[list[jax.Array], list[int]]:
    def one(*leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(call(op, *tree.unflatten(leaves)))

    return one_by_one(one, operands, dims)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    op, tree, out_tree = params["op"], params["tree"], params["out_tree"]
    results = _op_p.bind(*primals, **params)
    linear, fixed = tree.unflatten(primals)
    d_linear, d_fixed = tree.unflatten([_none_if_zero(t) for t in tangents])
    parts = []
    if jax.tree.leaves(d_linear):
        like = out_tree.unflatten(results) if op.is_whole else None
        parts.append(call(op, d_linear, fixed, like=like))
    if jax.tree.leaves(d_fixed):
        parts.append(op.tangent(out_tree.unflatten(results), linear, fixed, d_fixed))
    flat = [out_tree.flatten_up_to(part) for part in parts]
    sums = [_sum(terms) for terms in zip(*flat, strict=True)] or [None] * len(results)
    pairs = zip(results, sums, strict=True)
    return results, [_zero_of(jax.typeof(x)) if t is None else t for x, t in pairs]


def _transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    op, tree, out_tree = params["op"], params["tree"], params["out_tree"]
    wanted = [ad.is_undefined_primal(x) for x in operands]
    pairs = zip(operands, wanted, strict=True)
    linear, fixed = tree.unflatten([x.aval if is_wanted else x for x, is_wanted in pairs])
    given = out_tree.unflatten([_none_if_zero(t) for t in cotangents])
    if op.is_whole:
        given = fill(given, out_tree.unflatten(params["avals"]))
    pairs = zip(linear, op.transpose(given, linear, fixed), strict=True)
    of_linear = tuple(None if x is None else t for x, t in pairs)
    linear_tree: Any = jax.tree.structure(linear)
    found = linear_tree.flatten_up_to(of_linear)
    found += [None] * (len(operands) - len(found))
    return [
        None if not is_wanted else _zero_of(x.aval) if t is None else t
        for x, is_wanted, t in zip(operands, wanted, found, strict=True)
    ]


def _none_if_zero(tangent: Any) -> Any:
    is_zero = isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0
    return None if is_zero else tangent


def _zero_of(aval: Any) -> ad.Zero:
    return ad.Zero(aval.to_tangent_aval())


def _sum(terms: Sequence[Any]) -> Any:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


_op_p = Primitive("jax_ep_op")
_op_p.multiple_results = True
_op_p.def_impl(_run)
_op_p.def_abstract_eval(lambda *_, avals, **__: list(avals))
_compat.register_lowering_of_each(_op_p, _lower)
batching.primitive_batchers[_op_p] = _batch
ad.primitive_jvps[_op_p] = _jvp
ad.primitive_transposes[_op_p] = _transpose


class Form:
    """A function that is linear in each of two operands; hashable, as an ``Op`` is."""

    def value(self, u: Any, v: Any, fixed: Any) -> Any:
        """The function; ``fixed`` has no derivative."""
        raise NotImplementedError

    def pull(
        self, u: Any, v: Any, fixed: Any, cotangent: Any, wanted: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        """Cotangents of ``u`` and ``v``, made of ops; None will do for one that is not wanted."""
        raise NotImplementedError


def bilinear(form: Form, u: Any, v: Any, fixed: Any) -> Any:
    """``form.value``, with all derivatives; the backward pass runs one ``form.pull``."""
    return call(_Product(form), (), (u, v, fixed))


@dataclasses.dataclass(frozen=True)
class _Product(Op):
    """A form as a function of both operands."""

    form: Form

    def run(self, linear: Any, fixed: Any) -> Any:
        return self.form.value(*fixed)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        u, v, rest = fixed
        return call(ProductTangent(self.form), _both(tangents, u, v), (u, v, rest), like=results)


@dataclasses.dataclass(frozen=True)
class ProductTangent(Op):
    """``value(du, v) + value(u, dv)``, linear in ``du`` and ``dv`` together."""

    form: Form

    def run(self, linear: Any, fixed: Any) -> Any:
        (du, dv), (u, v, rest) = linear, fixed
        terms = [] if du is None else [self.form.value(du, v, rest)]
        terms += [] if dv is None else [self.form.value(u, dv, rest)]
        return jax.tree.map(lambda *leaves: _sum(leaves), *terms)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        # In the tangents of u and v it is the same function, about (du, dv).
        (du, dv), (u, v, rest) = linear, fixed
        about = (fill(du, u), fill(dv, v), rest)
        return call(self, _both(tangents, u, v), about, like=results)

    def transpose(self, cotangents: Any, linear: Any, fixed: Any) -> Any:
        u, v, rest = fixed
        wanted = linear[0] is not None, linear[1] is not None
        return self.form.pull(u, v, rest, cotangents, wanted)


def _both(tangents: Any, u: Any, v: Any) -> tuple[Any, Any]:
    """Tangents of ``u`` and ``v``, each with all its leaves or None."""
    du, dv = (
        fill(t, x) if jax.tree.leaves(t) else None for t, x in zip(tangents, (u, v), strict=False)
    )
    return du, dv
