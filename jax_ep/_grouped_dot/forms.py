"""The derivatives of grouped products: grouped products again.

Rows, matrices and cotangents of the products make one number, which is linear in each of the three::

    sum over rows r of <rows[r] @ matrices[group of r], cotangents[r]>

The product is its derivative by the cotangents, and the gradients of rows and matrices are those by
rows and by matrices. So there are three products of two of the three, and the backward pass of each
consists of the other two. The same holds for two matrices a group.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep._core.derivatives import Form, bilinear
from jax_ep._grouped_dot import products


@dataclasses.dataclass(frozen=True)
class ProductSms:
    """SMs that the kernels of a grouped product and of its gradients may occupy; None for all.

    Attributes:
        forward: Of the product itself.
        d_lhs: Of the gradient of the rows. If this one has fewer SMs than that of the matrices, it
            comes first, because it is beside an op that was started just before.
        d_rhs: Of the gradient of the matrices.
    """

    forward: int | None = None
    d_lhs: int | None = None
    d_rhs: int | None = None


ALL_SMS = ProductSms()

# Of rows, matrices and cotangents, the one that a product gives.
_Given = Literal["cotangents", "rows", "matrices"]
_ALL: tuple[_Given, ...] = ("rows", "matrices", "cotangents")


def product(
    sms: ProductSms,
    clears: bool,
    rows: Float[Array, "rows inner"],
    matrices: Any,
    group_sizes: Int32[Array, " groups"],
) -> Any:
    """The products of rows with the matrices of their groups: one array, or a pair of two.

    Args:
        sms: Numbers of SMs.
        clears: Whether rows past the last group are zeros, in the products and their gradient.
        rows: ``[C, H]``.
        matrices: ``[L, H, F]``, or a pair of two.
        group_sizes: ``[L]``.
    """
    return bilinear(_Products("cotangents", sms, clears), rows, matrices, group_sizes)


@dataclasses.dataclass(frozen=True)
class _Products(Form):
    """The product that gives one of the three, of the other two in the order of ``_ALL``.

    Attributes:
        gives: Which one.
        sms: SMs of the kernels.
        clears: Whether rows past the last group are zeros in rows and cotangents.
    """

    gives: _Given
    sms: ProductSms
    clears: bool

    def value(self, u: Any, v: Any, fixed: Any) -> Any:
        is_pair = isinstance(u, tuple) or isinstance(v, tuple)
        if self.gives == "matrices":
            by_rows = products.pair_by_rows if is_pair else products.rows_by_rows
            return by_rows(u, v, fixed, num_sms=self.sms.d_rhs)
        how: dict[str, Any] = {"clears": self.clears}
        if self.gives == "rows":
            how["num_sms"] = self.sms.d_lhs
            if is_pair:
                return products.sum_of_pair(v, u, fixed, **how)
            return products.rows_by_matrices(v, u, fixed, contract=1, **how)
        how["num_sms"] = self.sms.forward
        if is_pair:
            return products.rows_by_pair(u, v, fixed, **how)
        return products.rows_by_matrices(u, v, fixed, contract=0, **how)

    def pull(
        self, u: Any, v: Any, fixed: Any, cotangent: Any, wanted: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        of_u, of_v = (name for name in _ALL if name != self.gives)
        known = {of_u: u, of_v: v, self.gives: cotangent}
        d_u = d_v = None
        if wanted[0]:
            d_u = self._bring(of_u, known, fixed)
            if self.gives == "cotangents" and self._rows_come_first and wanted[1]:
                d_u, known[self.gives] = lax.optimization_barrier((d_u, known[self.gives]))
        if wanted[1]:
            d_v = self._bring(of_v, known, fixed)
        return d_u, d_v

    @property
    def _rows_come_first(self) -> bool:
        """Whether the gradient of the rows comes first, since it alone leaves SMs."""
        return self.sms.d_lhs is not None and self.sms.d_rhs is None

    def _bring(self, name: _Given, known: dict[_Given, Any], group_sizes: Any) -> Any:
        u, v = (known[other] for other in _ALL if other != name)
        return bilinear(dataclasses.replace(self, gives=name), u, v, group_sizes)
