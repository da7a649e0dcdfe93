"""Grouped matmuls as kernels for Hopper GPUs, in Pallas's Mosaic GPU dialect.

All kernels are persistent: each streaming multiprocessor that they may occupy runs one block, in
which one warpgroup loads tiles and two multiply, as in JAX's own matmul for Hopper
(``hopper_matmul_mgpu``). The rows of a tile follow from the group sizes, which only the GPU knows.

``by_matrices`` multiplies rows with the matrices of their groups, by a table of tiles that XLA
makes (``tile_table``). ``by_rows`` multiplies the rows of each group with other rows, for the
gradient of the matrices. Both also do two products at once that have rows in common, as gate and up
projection have, and their gradients. ``tiles`` says how they divide their work, ``pipeline`` has the
loop that they share, and ``edges`` the rows where groups meet. A kernel is lowered once for all
programs (``custom_call``).

This is the only package that knows Pallas, whose GPU interface is experimental.
"""

from jax_ep._grouped_dot.hopper.by_matrices import rows_by_matrices, rows_by_pair, sum_of_pair
from jax_ep._grouped_dot.hopper.by_rows import pair_by_rows, rows_by_rows
from jax_ep._grouped_dot.hopper.custom_call import custom_call
from jax_ep._grouped_dot.hopper.tiles import Tiles, why_not

__all__ = [
    "Tiles",
    "custom_call",
    "pair_by_rows",
    "rows_by_matrices",
    "rows_by_pair",
    "rows_by_rows",
    "sum_of_pair",
    "why_not",
]
