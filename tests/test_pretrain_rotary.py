"""Rotary positions of ``examples/pretrain``, with YaRN as DeepSeek-V3 has it."""

from __future__ import annotations

import pretrain_cases  # isort: skip  (first: it makes examples importable)

import numpy as np
import pytest

import dense_decoder
from examples.pretrain.config import ConfigError, load
from examples.pretrain.rotary import frequencies, rotate, score_scale

pytestmark = pytest.mark.one_process("needs no devices")

V3 = load("671b", ["model.rope_factor=40"]).model


def test_without_yarn():
    plain = load("671b").model
    np.testing.assert_allclose(frequencies(plain), 10_000.0 ** (-np.arange(32) / 32), rtol=1e-6)
    assert score_scale(plain) == pytest.approx(192**-0.5)


def test_yarn_of_deepseek():
    """By hand: pair i turns 4096 / (2 pi 10000^(i / 32)) times; 32 times at i = 10.5, once at 22.5."""
    found, plain = frequencies(V3), 10_000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(found[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-6)
    np.testing.assert_allclose(found[14], plain[14] * (9 + 4 / 40) / 13, rtol=1e-6)
    assert score_scale(V3) == pytest.approx((0.1 * np.log(40) + 1) ** 2 / np.sqrt(192))


@pytest.mark.parametrize("length", [16, 4096, 100_000])
@pytest.mark.parametrize("channels", [4, 64])
def test_yarn_pair_by_pair(length, channels):
    """Also where the range of pairs is cut off at either end."""
    model = load(
        "671b",
        [
            "model.rope_factor=8",
            f"model.rope_original_seq_len={length}",
            f"model.qk_rope_head_dim={channels}",
        ],
    ).model
    np.testing.assert_allclose(frequencies(model), dense_decoder.frequencies(model), rtol=1e-6)


def test_scores_depend_on_the_distance():
    random, turns = np.random.default_rng(0), frequencies(V3)
    q, k = random.standard_normal((2, 64)).astype(np.float32)

    def score(at_query: int, at_key: int) -> float:
        there = np.array([[at_query, at_key]])
        both = np.asarray(rotate(np.stack([q, k])[None, :, None], there, turns))[0, :, 0]
        return float(both[0] @ both[1])

    assert score(700, 693) == pytest.approx(score(7, 0), rel=1e-3)
    assert abs(score(700, 600) - score(7, 0)) > 0.1


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.rope_factor=0.5", "model.rope_factor: expected 1 or more, got 0.5"),
        ("model.rope_beta_slow=40", "expected more than 0, less than 32.0, got 40.0"),
    ],
)
def test_wrong_settings(override, text):
    with pytest.raises(ConfigError) as raised:
        pretrain_cases.small(override)
    assert text in str(raised.value)
