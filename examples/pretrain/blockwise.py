"""Causal attention block by block, with a running softmax, within segments.

Scores of all pairs of positions never exist: a scan goes through the pairs of a block of queries and a
block of keys that is not later, and the backward pass computes the scores of each pair again (Dao et
al., FlashAttention, arXiv:2205.14135). So memory is that of queries, keys and values, and of the
scores of one pair of blocks. Queries and keys may have more channels than values, as those of
multi-head latent attention do, which cuDNN's kernels refuse.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

BLOCK = 1024  # smaller ones skip more of what comes later, larger ones move their sums less often
RESULTS = "pretrain.attention"  # what jax.checkpoint knows the results by
_NEVER = -1e30  # a score that exp turns into zero; minus infinity would turn into NaN


def block_size(seq_len: int, most: int = BLOCK) -> int:
    """The largest divisor of ``seq_len`` that is at most ``most``."""
    return next(size for size in range(min(seq_len, most), 0, -1) if seq_len % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
    q: Float[Array, "batch seq heads keys"],
    k: Float[Array, "batch seq heads keys"],
    v: Float[Array, "batch seq heads values"],
    segments: Int32[Array, "batch seq"],
    scale: float,
    block: int,
) -> Float[Array, "batch seq heads values"]:
    """Each position's mean of the values before it in its segment, weighted by softmax.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segments: A position sees positions with the same number only.
        scale: Factor of the scores.
        block: Positions of a block, a divisor of the length.
    """
    return _forward(q, k, v, segments, scale, block)[0]


def _pairs(num_blocks: int) -> tuple[Int32[np.ndarray, " pairs"], Int32[np.ndarray, " pairs"]]:
    """Blocks of queries, and for each of them the blocks of keys up to it."""
    rows, columns = np.tril_indices(num_blocks)
    return rows.astype(np.int32), columns.astype(np.int32)


def _together(*values: Any) -> Any:
    """``values``, none of which JAX sees as known before the others.

    Differentiating a loop of layers, JAX computes apart what does not depend on the layer, here the
    masks of all pairs, and keeps them: a byte for each score.
    """
    return jax.lax.optimization_barrier(values)


def _blocks(x: Array, block: int) -> Array:
    """``[batch, seq, ...]`` as ``[blocks, batch, block, ...]``."""
    batch, seq = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, seq // block, block, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """The inverse of ``_blocks``."""
    num, batch, block = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, num * block, *x.shape[3:])


def _scores(
    q: Float[Array, "batch block heads keys"],
    k: Float[Array, "batch block heads keys"],
    of_q: Int32[Array, "batch block"],
    of_k: Int32[Array, "batch block"],
    i: Int32[Array, ""],
    j: Int32[Array, ""],
    scale: float,
) -> Float32[Array, "batch heads block block"]:
    """Scores of query block i and key block j, those that do not count far below zero."""
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    position = jnp.arange(q.shape[1], dtype=jnp.int32)
    earlier = (i > j) | (position[:, None] >= position[None, :])
    seen = earlier & (of_q[:, :, None] == of_k[:, None, :])
    # One number for all heads, made apart, so that XLA adds it wherever it reads scores and does not
    # write the sum to memory.
    bias = jax.lax.optimization_barrier(jnp.where(seen, 0.0, _NEVER))
    return scores * scale + bias[:, None]


def _forward(q: Array, k: Array, v: Array, segments: Array, scale: float, block: int) -> Any:
    qs, ks, vs, of = (_blocks(x, block) for x in (q, k, v, segments))
    (qs, of), pairs = _together((qs, of), _pairs(len(qs)))
    num, batch, _, heads, _ = qs.shape
    row = jnp.zeros((batch, heads, block), jnp.float32)
    total = jnp.zeros((*row.shape, v.shape[-1]), jnp.float32)
    outs = jnp.zeros((num, batch, block, heads, v.shape[-1]), q.dtype)
    logs = jnp.zeros((num, *row.shape), jnp.float32)

    def pair(carry: Any, ij: Any) -> Any:
        (most, mass, total), outs, logs = carry
        i, j = ij
        scores = _scores(qs[i], ks[j], of[i], of[j], i, j, scale)
        first = j == 0
        most = jnp.where(first, _NEVER, most)
        new = jnp.maximum(most, scores.max(axis=-1))
        # Where a row has seen nothing yet, these are ones; ``keep`` turns them into zeros later.
        weights = jnp.exp(scores - new[..., None])
        keep = jnp.where(first, 0, jnp.exp(most - new))
        mass = keep * mass + weights.sum(axis=-1)
        mixed = jnp.einsum(
            "bnqk,bknd->bnqd", weights.astype(v.dtype), vs[j], preferred_element_type=jnp.float32
        )
        total = keep[..., None] * total + mixed
        # Of what a row of blocks writes here the last is left: that of its last block of keys.
        out = jnp.einsum("bnqd->bqnd", total / mass[..., None])
        outs = outs.at[i].set(out.astype(outs.dtype))
        logs = logs.at[i].set(new + jnp.log(mass))
        return ((new, mass, total), outs, logs), None

    start = ((row, row, total), outs, logs)
    (_, outs, logs), _ = jax.lax.scan(pair, start, pairs)
    # A policy of jax.checkpoint that keeps these two computes no scores again but in the backward pass.
    out, logs = (checkpoint_name(x, RESULTS) for x in (_join(outs), logs))
    return out, (q, k, v, segments, out, logs)


def _backward(scale: float, block: int, saved: Any, d_out: Array) -> Any:
    q, k, v, segments, out, logs = saved
    qs, ks, vs, of, outs, d_outs = (_blocks(x, block) for x in (q, k, v, segments, out, d_out))
    (qs, of), pairs = _together((qs, of), _pairs(len(qs)))
    exact = jnp.float32
    delta = jnp.einsum("ibqnd,ibqnd->ibnq", outs.astype(exact), d_outs.astype(exact))

    def pair(carry: Any, ij: Any) -> Any:
        d_q, d_k, d_v = carry
        i, j = ij
        scores = _scores(qs[i], ks[j], of[i], of[j], i, j, scale)
        weights = jnp.exp(scores - logs[i][..., None])
        into = {"preferred_element_type": exact}
        d_v_j = jnp.einsum("bnqk,bqnd->bknd", weights.astype(v.dtype), d_outs[i], **into)
        d_weights = jnp.einsum("bqnd,bknd->bnqk", d_outs[i], vs[j], **into)
        d_scores = (weights * (d_weights - delta[i][..., None]) * scale).astype(q.dtype)
        d_q_i = jnp.einsum("bnqk,bknd->bqnd", d_scores, ks[j], **into)
        d_k_j = jnp.einsum("bnqk,bqnd->bknd", d_scores, qs[i], **into)
        return (d_q.at[i].add(d_q_i), d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)), None

    start = tuple(jnp.zeros(x.shape, exact) for x in (qs, ks, vs))
    grads, _ = jax.lax.scan(pair, start, pairs)
    d_q, d_k, d_v = (_join(g).astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v, None


attention.defvjp(_forward, _backward)
