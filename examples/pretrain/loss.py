"""Cross entropy of a large vocabulary, a few tokens at a time.

All logits of a sequence of 4096 tokens and 129280 ids would take 2 GiB, and as much again for their
gradients. A scan makes those of a chunk of positions, in float32, and makes them again backward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from examples.pretrain.blockwise import block_size
from examples.pretrain.parallel import BATCH_AXES

LOGITS = 1 << 26  # of a chunk on one device, at most; 256 MiB


def cross_entropy(
    x: Float[Array, "batch seq hidden"],
    head: Float[Array, "hidden vocab"],
    targets: Int32[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    mesh: Mesh,
) -> Float32[Array, ""]:
    """The sum over positions with ``mask`` of −log p(target), in nats.

    Args:
        x: Normalized states, split over the batch.
        head: Gathered, in the dtype of the computation; its columns are split over "tensor".
        targets: Ids.
        mask: Positions that count.
        mesh: The mesh.
    """
    batch = P(BATCH_AXES, None)
    run = jax.shard_map(
        _on_one_device,
        mesh=mesh,
        in_specs=(P(BATCH_AXES, None, None), P(None, "tensor"), batch, batch),
        out_specs=P(),
    )
    return run(x, head, targets, mask)


def _on_one_device(x: Array, head: Array, targets: Array, mask: Array) -> Array:
    rows = x.shape[0] * head.shape[1]
    size = block_size(x.shape[1], max(1, LOGITS // rows))
    # The gradient of the head is a sum over chunks: in float32, and over devices once, after that.
    exact = lax.pcast(head.astype(jnp.float32), BATCH_AXES, to="varying")
    dtype = head.dtype

    def chunks(values: Array) -> Array:
        parts = values.reshape(values.shape[0], -1, size, *values.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, targets, mask = chunk
        logits = jnp.einsum(
            "bsh,hv->bsv", x, exact.astype(dtype), preferred_element_type=jnp.float32
        )
        return total + jnp.sum(jnp.where(mask, _nats(logits, targets), 0)), None

    start = lax.pcast(jnp.float32(0), BATCH_AXES, to="varying")
    total, _ = lax.scan(add, start, (chunks(x), chunks(targets), chunks(mask)))
    return lax.psum(total, BATCH_AXES)


def _nats(logits: Array, targets: Array) -> Array:
    """−log p of each target; the vocabulary is split over "tensor"."""
    most = lax.pmax(lax.stop_gradient(logits.max(axis=-1)), "tensor")
    mass = lax.psum(jnp.exp(logits - most[..., None]).sum(axis=-1), "tensor")
    mine = targets - lax.axis_index("tensor") * logits.shape[-1]
    here = (mine >= 0) & (mine < logits.shape[-1])
    index = jnp.clip(mine, 0, logits.shape[-1] - 1)
    found = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    chosen = lax.psum(jnp.where(here, found, 0), "tensor")
    return jnp.log(mass) + most - chosen
