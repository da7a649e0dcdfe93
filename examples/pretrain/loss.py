"""Cross entropy of a large vocabulary, a few tokens at a time.

All logits of a sequence of 4096 tokens and 129280 ids would take 2 GiB, and as much again for their
gradients. A scan makes those of a chunk of positions, in float32, and makes them again backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from examples.pretrain.blockwise import block_size
from examples.pretrain.parallel import BATCH_AXES, gather_here, layout

LOGITS = 1 << 26  # of a chunk on one device, at most; 256 MiB


class Prediction(NamedTuple):
    """States to predict tokens from.

    Attributes:
        x: ``[B, S, H]``, normalized and split over the batch.
        targets: ``[B, S]`` ids.
        mask: ``[B, S]`` positions that count.
    """

    x: Float[Array, "batch seq hidden"]
    targets: Int32[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]


def cross_entropy(
    predictions: tuple[Prediction, ...],
    head: Float32[Array, "hidden vocab"],
    mesh: Mesh,
    dtype: DTypeLike,
) -> tuple[Float32[Array, ""], ...]:
    """For each prediction, the sum over positions with ``mask`` of −log p(target), in nats.

    Args:
        predictions: What the head, which is gathered once, works on.
        head: As it is stored. "tensor" splits its columns, and so the logits.
        mesh: The mesh.
        dtype: Of the computation.
    """
    batch: Any = P(BATCH_AXES, None)
    states: Any = P(BATCH_AXES, None, None)
    of_each = Prediction(states, batch, batch)
    run = jax.shard_map(
        functools.partial(_on_one_device, dtype=dtype),
        mesh=mesh,
        in_specs=((of_each,) * len(predictions), layout(("head", "kernel"), 2).stored),
        out_specs=(P(),) * len(predictions),
    )
    return run(predictions, head)


def _on_one_device(
    predictions: tuple[Prediction, ...], head: Array, dtype: DTypeLike
) -> tuple[Array, ...]:
    head = gather_here(head, axis=0, dtype=dtype)
    return tuple(_sum_of_nats(head, *prediction) for prediction in predictions)


def _sum_of_nats(head: Array, x: Array, targets: Array, mask: Array) -> Array:
    logits_of_position = x.shape[0] * head.shape[1]
    size = block_size(x.shape[1], max(1, LOGITS // logits_of_position))

    def chunks(values: Array) -> Array:
        parts = values.reshape(values.shape[0], -1, size, *values.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total: Array, chunk: Prediction) -> tuple[Array, None]:
        # The gradient of x is a sum over "tensor", over which the head varies.
        logits = _logits(lax.pcast(chunk.x, "tensor", to="varying"), head)
        return total + jnp.sum(jnp.where(chunk.mask, _nats(logits, chunk.targets), 0)), None

    start = lax.pcast(jnp.float32(0), BATCH_AXES, to="varying")
    total, _ = lax.scan(add, start, Prediction(chunks(x), chunks(targets), chunks(mask)))
    return lax.psum(total, BATCH_AXES)


@jax.custom_vjp
def _logits(
    x: Float[Array, "batch seq hidden"], head: Float[Array, "hidden vocab"]
) -> Float32[Array, "batch seq vocab"]:
    """Logits in float32; all three products are of the dtype of ``x``, and add in float32.

    JAX alone would multiply the logits' gradient in float32, which takes twice as long or more.
    """
    return _product("bsh,hv->bsv", x, head.astype(x.dtype))


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _logits_fwd(x: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(x, head), (x, head)


def _logits_bwd(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, head = saved
    gradient = gradient.astype(x.dtype)
    d_x = _product("bsv,hv->bsh", gradient, head.astype(x.dtype))
    # That of ``head`` is a sum over chunks, in its dtype: float32.
    d_head = _product("bsh,bsv->hv", x, gradient)
    return d_x.astype(x.dtype), d_head.astype(head.dtype)


_logits.defvjp(_logits_fwd, _logits_bwd)


def _nats(
    logits: Float32[Array, "batch seq vocab"], targets: Int32[Array, "batch seq"]
) -> Float32[Array, "batch seq"]:
    """−log p of each target; the vocabulary is split over "tensor"."""
    most = lax.pmax(lax.stop_gradient(logits.max(axis=-1)), "tensor")
    mass = lax.psum(jnp.exp(logits - most[..., None]).sum(axis=-1), "tensor")
    mine = targets - lax.axis_index("tensor") * logits.shape[-1]
    here = (mine >= 0) & (mine < logits.shape[-1])
    index = jnp.clip(mine, 0, logits.shape[-1] - 1)
    found = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    chosen = lax.psum(jnp.where(here, found, 0), "tensor")
    return jnp.log(mass) + most - chosen
