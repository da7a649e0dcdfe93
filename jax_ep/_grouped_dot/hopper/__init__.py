"""Grouped matmuls as kernels for Hopper GPUs, in Pallas's Mosaic GPU dialect.

Both kernels are persistent: each streaming multiprocessor that they may occupy runs one block, in
which one warpgroup loads tiles and two multiply. JAX's own matmul for Hopper
(``hopper_matmul_mgpu``) does the same, and the kernels use its pipeline. They add the schedule: the
rows of a tile follow from the group sizes, which only the GPU knows.

``by_matrices`` multiplies rows with the matrices of their groups, by a table of tiles that XLA
makes (``tile_table``). ``by_rows`` multiplies the rows of each group with other rows, for the
gradient of the matrices. ``tiles`` says how both divide their work, and ``pipeline`` has the parts
that they share. A kernel is lowered once for all programs (``custom_call``).

This is the only package that knows Pallas, whose GPU interface is experimental.
"""

from jax_ep._grouped_dot.hopper.by_matrices import rows_by_matrices
from jax_ep._grouped_dot.hopper.by_rows import rows_by_rows
from jax_ep._grouped_dot.hopper.custom_call import custom_call
from jax_ep._grouped_dot.hopper.tiles import Tiles, why_not

__all__ = ["Tiles", "custom_call", "rows_by_matrices", "rows_by_rows", "why_not"]
