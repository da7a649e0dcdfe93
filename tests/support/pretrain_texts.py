"""Small texts and packed rows of them, for tests of ``examples/pretrain``."""

from __future__ import annotations

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from examples.pretrain import tokenizer
from examples.pretrain.pack import pack

VOCAB = 300
_WORDS = ("rank", "expert", "token", "row", "mesh", "host", "gather", "scatter", "plan", "lane")


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Documents of one to sixty words."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, size=count)
    return [" ".join(random.choice(_WORDS, size=length)) for length in lengths]


def make_rows(
    folder: pathlib.Path, *, seq_len: int = 16, count: int = 200, seed: int = 0
) -> pathlib.Path:
    """Rows of ``count`` documents in ``folder``, which this makes; all folders have one tokenizer."""
    documents = texts(count, seed=seed)
    trained = tokenizer.train(texts(count), vocab=VOCAB)
    pack(documents, trained, folder, seq_len=seq_len, held_out=0.1, rows_per_file=64)
    return folder
