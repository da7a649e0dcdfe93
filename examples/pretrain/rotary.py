"""Rotary positions (Su et al., arXiv:2104.09864), and YaRN, which scales them for longer sequences.

YaRN (Peng et al., arXiv:2309.00071) leaves the channels with many turns in a sequence of the original
length as they are, divides the frequencies of those with few turns, and blends in between. As
DeepSeek-V3 does, it also makes the scores of attention larger.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from examples.pretrain.config import ModelConfig


def frequencies(config: ModelConfig) -> Float32[np.ndarray, " half"]:
    """The angle, in radians, by which each pair of channels turns from one position to the next."""
    half = config.qk_rope_head_dim // 2
    plain = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_factor == 1:
        return plain.astype(np.float32)
    # Pairs up to the first turn more than ``beta_fast`` times, those from the second less than
    # ``beta_slow`` times.
    first = max(math.floor(_pair_with_turns(config, config.rope_beta_fast)), 0)
    second = min(math.ceil(_pair_with_turns(config, config.rope_beta_slow)), 2 * half - 1)
    slow = np.clip((np.arange(half) - first) / max(second - first, 1e-3), 0, 1)
    return (plain * (1 - slow) + plain / config.rope_factor * slow).astype(np.float32)


def _pair_with_turns(config: ModelConfig, turns: float) -> float:
    """The pair, a fraction, that turns so often in a sequence of the original length."""
    half = config.qk_rope_head_dim // 2
    wavelength = config.rope_original_seq_len / (2 * math.pi * turns)  # over 2 pi
    return half * math.log(wavelength) / math.log(config.rope_theta)


def score_scale(config: ModelConfig) -> float:
    """The factor of the attention's scores."""
    mscale = 0.1 * config.rope_mscale * math.log(config.rope_factor) + 1
    return mscale**2 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)


def rotate(
    x: Float[Array, "batch seq heads channels"],
    positions: Int32[Array, "batch seq"],
    frequencies: Float32[np.ndarray, " half"],
) -> Float[Array, "batch seq heads channels"]:
    """Turn the pair of channels (i, i + half) of position p by p times the frequency of i."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
