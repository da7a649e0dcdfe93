"""An error that says what to do where there is no forward mode.

A function with ``jax.custom_vjp`` has none, and JAX's error does not say what to do instead. Operands
that come through ``only_reverse`` are the same, and so are their cotangents. But where a program needs
their tangents, its lowering is a TypeError.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep import _compat


def only_reverse(x: jax.Array, text: str) -> jax.Array:
    """``x``, for whose tangents ``text`` is the error."""
    return _value_p.bind(x, text=text)


def _refuse(*_: Any, text: str) -> Any:
    raise TypeError(text)


_value_p = Primitive("jax_ep_only_reverse")
_value_p.def_impl(lambda x, **_: x)
_value_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_value_p, lambda ctx, x, **_: [x])
batching.defvectorized(_value_p)

_tangent_p = Primitive("jax_ep_no_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x, **_: x)
_compat.register_lowering_of_each(_tangent_p, _refuse)
batching.defvectorized(_tangent_p)

ad.deflinear2(_tangent_p, lambda cotangent, x, **_: (cotangent,))
ad.defjvp(_value_p, lambda tangent, x, *, text: _tangent_p.bind(tangent, text=text))
