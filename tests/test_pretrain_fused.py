"""cuDNN's attention in ``examples/pretrain``, beside the one that goes block by block."""

from __future__ import annotations

import pretrain_cases  # isort: skip  (first: it makes examples importable)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrain_texts
from examples.pretrain import blockwise, fused, pack, step, tokenizer
from examples.pretrain.config import ConfigError
from examples.pretrain.rows import Summary

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0], [1, 2, 2, 0, 0, 0, 0, 0]])


def test_bounds_of_segments():
    """Those of a row, then its rest, then −1."""
    starts, lengths = fused.bounds(jnp.asarray(SEGMENTS, jnp.int32), 3)
    np.testing.assert_array_equal(
        starts, [[0, 3, 5, -1, -1], [0, 6, -1, -1, -1], [0, 1, 3, -1, -1]]
    )
    np.testing.assert_array_equal(lengths, [[3, 2, 3, -1], [6, 2, -1, -1], [1, 2, 5, -1]])


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("scratch", [fused._SCRATCH_BYTES, 1])
def test_it_gives_what_blocks_give(scratch, monkeypatch):
    """Values and gradients, where rows go through it together and one by one."""
    monkeypatch.setattr(fused, "_SCRATCH_BYTES", scratch)
    batch, seq, heads, most, scale = 3, 512, 2, 4, 192**-0.5
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (batch, seq, heads, 192), jnp.bfloat16) for key in keys[:2])
    v, ct = (jax.random.normal(key, (batch, seq, heads, 128), jnp.bfloat16) for key in keys[2:])
    lengths = [[200, 100, 150, 62], [512, 0, 0, 0], [1, 300, 0, 0]]  # the last row is not full
    numbers = [np.repeat(np.arange(1, 5), row) for row in lengths]
    segments = jnp.asarray(np.stack([np.pad(n, (0, seq - len(n))) for n in numbers]), jnp.int32)
    used = (segments > 0)[..., None, None]

    def by(mix):
        y, back = jax.vjp(lambda q, k, v: jnp.where(used, mix(q, k, v), 0), q, k, v)
        return y, *back(ct)

    expected = jax.jit(lambda: by(lambda *x: blockwise.attention(*x, segments, scale, 128)))()
    got = jax.jit(
        lambda: by(lambda *x: fused.attention(*x, segments, scale=scale, most_segments=most))
    )()
    for mine, other in zip(got, expected, strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, other))
        np.testing.assert_allclose(mine, other, atol=0.02 * np.abs(other).max())


def test_a_configuration_that_it_cannot_serve():
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match=r"model.attention: 'cudnn' needs GPUs that are here"):
            step.setup(pretrain_cases.small("model.attention=cudnn"), jax.devices()[:8])


def test_rows_keep_to_a_number_of_documents(tmp_path):
    texts = pretrain_texts.texts(60)
    trained = tokenizer.train(texts, vocab=300)
    for most in (1, 3):
        summary = pack.pack(
            texts, trained, tmp_path / str(most), seq_len=200, held_out=0.2, most_segments=most
        )
        assert Summary.read(tmp_path / str(most)).most_segments == most
        assert summary.num_targets["train"] > 0
