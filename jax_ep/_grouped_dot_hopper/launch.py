"""What both kernels have around them: the form of their operands, and their launch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _compat, _numerics
from jax_ep._grouped_dot_hopper.pipeline import plgpu

_ROW_MULTIPLE = 8  # rows of a tile in shared memory


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` as the sum of two bfloat16 arrays, up to 2⁻¹⁶ of it."""
    high = _numerics.round_to(x, jnp.bfloat16)  # a pair of casts XLA would drop
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def pad_rows(x: jax.Array) -> jax.Array:
    """``x`` with zeros below it, up to a number of rows that kernels can load."""
    return jnp.pad(x, ((0, -x.shape[0] % _ROW_MULTIPLE), (0, 0)))


def launch(body: Any, out: Any, *operands: jax.Array) -> jax.Array:
    """Runs ``body`` in one block on each streaming multiprocessor."""
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=(_compat.num_multiprocessors(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # Pallas loses track of the mesh axes that its operands vary over.
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    return _compat.cast_varying(kernel(*operands), axes)
