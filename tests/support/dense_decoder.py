"""The decoder of ``examples/pretrain`` written out densely, for one device and without jax_ep.

Attention makes all scores, every expert works on every token, and a matrix of weights, zero where an
expert was not chosen, picks the outputs. Weights and mathematics are the same, but nothing is split,
put into blocks or dispatched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_EPSILON = 1e-6  # of the norms


class Report(NamedTuple):
    """Losses of the next token and of the one after it (or None), and what layers report."""

    loss: Array
    mtp_loss: Array | None
    sequence_loss: Array
    load: Array


def loss(config: Any, params: dict[str, Any], biases: Array, batch: dict[str, Array]) -> Report:
    """Run the model on a batch.

    Args:
        config: A ``ModelConfig`` of the example.
        params: Its parameters.
        biases: Router biases, ``[layers, E]``.
        batch: "tokens" and "segments", ``[B, S + 1]``.

    Returns:
        Mean losses, the sum of the layers' balancing losses and their loads.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    embedded = params["embedding"][tokens]
    x, where = embedded[:, :-1], segments[:, :-1]
    reports = []
    for index in range(config.num_dense_layers):
        x, _ = _layer(config, _take(params["dense"], index), None, x, where)
    for index in range(config.num_moe_layers):
        x, report = _layer(config, _take(params["moe"], index), biases[index], x, where)
        reports.append(report)
    head = params["head"]["kernel"]
    count = _mask(segments, 1).sum()
    total = _nats(_norm(x, params["norm"]) @ head, tokens, _mask(segments, 1), 1) / count
    ahead = None
    if config.mtp:
        mtp = params["mtp"]
        parts = _norm(x, mtp["norm_hidden"]), _norm(embedded[:, 1:], mtp["norm_embedding"])
        x = jnp.concatenate(parts, axis=-1) @ mtp["project"]["kernel"]
        x, report = _layer(config, mtp["block"], biases[-1], x, where)
        reports.append(report)
        logits = _norm(x, mtp["norm"])[:, :-1] @ head
        ahead = _nats(logits, tokens, _mask(segments, 2), 2) / count
    losses, loads = zip(*reports, strict=True)
    return Report(total, ahead, sum(losses), jnp.stack(loads))


def _take(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _mask(segments: Array, ahead: int) -> Array:
    return (segments[:, ahead:] == segments[:, :-ahead]) & (segments[:, :-ahead] > 0)


def _nats(logits: Array, tokens: Array, mask: Array, ahead: int) -> Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, ahead:, None], axis=-1)
    return -(chosen[..., 0] * mask).sum()


def _norm(x: Array, params: dict[str, Array]) -> Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON) * params["scale"]


def _layer(config: Any, params: Any, bias: Array | None, x: Array, segments: Array) -> Any:
    x = x + _attention(config, params["attention"], _norm(x, params["norm_attention"]), segments)
    normed = _norm(x, params["norm_mlp"])
    if bias is None:
        mlp = jax.tree.leaves(params["mlp"])  # down, gate, up
        return x + (jax.nn.silu(normed @ mlp[1]) * (normed @ mlp[2])) @ mlp[0], None
    y, report = _experts(config, params["experts"], bias, normed, segments > 0)
    return x + y, report


def _attention(config: Any, params: Any, x: Array, segments: Array) -> Array:
    batch, seq, _ = x.shape
    nope, rope, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.num_heads

    def linear(name: str, x: Array) -> Array:
        return x @ params[name]["kernel"]

    if config.q_lora_rank:
        q = linear("q_b", _norm(linear("q_a", x), params["q_norm"]))
    else:
        q = linear("q", x)
    q = q.reshape(batch, seq, heads, nope + rope)
    latent = linear("kv_a", x)
    k_rope = latent[:, :, None, config.kv_lora_rank :]
    kv = linear("kv_b", _norm(latent[..., : config.kv_lora_rank], params["kv_norm"]))
    kv = kv.reshape(batch, seq, heads, nope + config.v_head_dim)
    same = segments[:, :, None] == segments[:, None, :]
    earlier = same & jnp.tril(jnp.ones((seq, seq), bool))
    # Positions before this one in its segment, which is one stretch of the row.
    positions = earlier.sum(axis=-1) - 1
    scores = jnp.einsum("bqnc,bknc->bnqk", q[..., :nope], kv[..., :nope])
    turns = frequencies(config)
    q_rope = _rotate(q[..., nope:], positions, turns)
    k_rope = _rotate(k_rope, positions, turns)[:, :, 0]
    scores = scores + jnp.einsum("bqnc,bkc->bnqk", q_rope, k_rope)
    scores *= (1 + config.rope_mscale * np.log(config.rope_factor) / 10) ** 2
    scores = jnp.where(earlier[:, None], scores / jnp.sqrt(nope + rope), -jnp.inf)
    mixed = jnp.einsum("bnqk,bknc->bqnc", jax.nn.softmax(scores), kv[..., nope:])
    return linear("out", mixed.reshape(batch, seq, -1))


def frequencies(config: Any) -> np.ndarray:
    """Radians of each pair of channels for a position: YaRN's, one pair after the other."""
    half, factor, length = (
        config.qk_rope_head_dim // 2,
        config.rope_factor,
        config.rope_original_seq_len,
    )

    def pair(turns: float) -> float:
        """Where ``length / wavelength`` is ``turns``, a wavelength being 2 pi theta^(pair / half)."""
        return half * np.log(length / (2 * np.pi * turns)) / np.log(config.rope_theta)

    fast = max(np.floor(pair(config.rope_beta_fast)), 0)
    slow = min(np.ceil(pair(config.rope_beta_slow)), config.qk_rope_head_dim - 1)
    found = []
    for index in range(half):
        plain = config.rope_theta ** (-index / half)
        if index <= fast:
            found.append(plain)
        elif index >= slow:
            found.append(plain / factor)
        else:
            part = (index - fast) / (slow - fast)
            found.append((1 - part) * plain + part * plain / factor)
    return np.array(found, np.float32)


def _rotate(x: Array, positions: Array, turns: np.ndarray) -> Array:
    """Channels i and i + half as a complex number, turned by its position."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * turns
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)[:, :, None]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _experts(config: Any, params: Any, bias: Array, x: Array, mask: Array) -> Any:
    """Output, and balancing loss and load."""
    num_experts, top_k = config.num_experts, config.top_k
    scores = jax.nn.sigmoid(x @ params["router_kernel"])
    selection = scores + bias
    groups = selection.reshape(*x.shape[:-1], config.num_expert_groups, -1)
    if config.num_expert_groups > 1:
        of_group = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
        kept = jax.lax.top_k(of_group, config.top_k_groups)[1]
        kept = jax.nn.one_hot(kept, config.num_expert_groups).sum(axis=-2)
        selection = jnp.where(kept[..., None] > 0, groups, -jnp.inf).reshape(selection.shape)
    chosen = jax.nn.one_hot(jax.lax.top_k(selection, top_k)[1], num_experts).sum(axis=-2)
    weights = scores * chosen
    weights = config.routed_scaling * weights / weights.sum(axis=-1, keepdims=True)
    gated = jax.nn.silu(jnp.einsum("bsh,ehf->bsef", x, params["gate"]))
    gated = gated * jnp.einsum("bsh,ehf->bsef", x, params["up"])
    outputs = jnp.einsum("bsef,efh->bseh", gated, params["down"])
    y = jnp.einsum("bse,bseh->bsh", weights * mask[..., None], outputs)
    x = x * mask[..., None]
    y += (jax.nn.silu(x @ params["shared_gate"]) * (x @ params["shared_up"])) @ params[
        "shared_down"
    ]
    # DeepSeek-V3, equations 17 to 20, with the experts of the largest scores; mean over sequences.
    best = jax.nn.one_hot(jax.lax.top_k(scores, top_k)[1], num_experts).sum(axis=-2)
    shares = scores / scores.sum(axis=-1, keepdims=True)
    tokens = mask.sum(axis=1)[:, None]
    often = (best * mask[..., None]).sum(axis=1) * num_experts / (top_k * tokens)
    likely = (shares * mask[..., None]).sum(axis=1) / tokens
    balance = (often * likely).sum(axis=-1).mean()
    load = (chosen * mask[..., None]).sum(axis=(0, 1)).astype(jnp.int32)
    return y, (balance, load)
