"""Packed rows of Python's own library, for runs that bring no data."""

from __future__ import annotations

import pathlib

import jax
from jax.experimental import multihost_utils

from examples.pretrain import tokenizer
from examples.pretrain.config import Config
from examples.pretrain.documents import documents
from examples.pretrain.pack import pack
from examples.pretrain.rows import MOST_SEGMENTS

_HELD_OUT = 0.02


def default_rows(folder: pathlib.Path, config: Config) -> pathlib.Path:
    """``folder`` with rows for ``config``; they are made if they are not there.

    Process 0 makes them, and the others wait. ``folder`` is one that all of them see.
    """
    if jax.process_index() == 0 and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        trained = tokenizer.train(documents(()), vocab=config.model.vocab_size)
        most = config.model.most_segments if config.model.attention == "cudnn" else MOST_SEGMENTS
        pack(
            documents(()),
            trained,
            folder,
            seq_len=config.data.seq_len,
            held_out=_HELD_OUT,
            most_segments=most,
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("rows are packed")
    return folder
