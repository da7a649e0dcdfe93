"""Text as bytes, and batches of it as a pure function of (seed, step).

Every process computes the whole batch of a step and keeps its own part, so any number of processes
and any resumed run see the same data with no state to save. That is all this example needs of an
input pipeline; for data that does not fit in memory, use grain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32, UInt8

from common.texts import is_text, text_files

VOCAB = 256

_HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and bytes to test on.

    Attributes:
        train: ``[N]`` uint8.
        held_out: ``[M]`` uint8, of other files than ``train`` where there are enough of them, else
            the last twentieth of the text.
        source: Where the text came from, as a text to print.
    """

    train: UInt8[np.ndarray, " train_bytes"]
    held_out: UInt8[np.ndarray, " held_out_bytes"]
    source: str

    def batch(
        self, *, seed: int, step: int, batch_size: int, seq_len: int
    ) -> Int32[np.ndarray, "batch seq_plus_one"]:
        """Random windows of ``seq_len + 1`` bytes: inputs and, one byte on, targets."""
        random = np.random.default_rng([seed, step])
        starts = random.integers(0, len(self.train) - seq_len, size=batch_size)
        return _windows(self.train, starts, seq_len)

    def held_out_batches(
        self, *, num_batches: int, batch_size: int, seq_len: int
    ) -> Iterable[Int32[np.ndarray, "batch seq_plus_one"]]:
        """Windows spread evenly over the held-out bytes, the same ones each time."""
        count = num_batches * batch_size
        starts = np.linspace(0, len(self.held_out) - seq_len - 1, count).astype(np.int64)
        for chunk in starts.reshape(num_batches, batch_size):
            yield _windows(self.held_out, chunk, seq_len)

    def fingerprint(self) -> str:
        """A hash of both parts: equal for equal texts."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(hashlib.sha256(self.held_out.tobytes()).digest())
        return digest.hexdigest()

    def unigram_loss(self, batches: Iterable[Int32[np.ndarray, "batch seq_plus_one"]]) -> float:
        """Nats per target byte of a model that only knows the byte frequencies of ``train``."""
        counts = np.bincount(self.train, minlength=VOCAB) + 1.0  # add one: no byte is impossible
        nats = -np.log(counts / counts.sum())
        return float(np.mean([nats[batch[:, 1:]].mean() for batch in batches]))


def load(path: pathlib.Path | None, *, min_bytes: int) -> Corpus:
    """Read a corpus in an order that depends on file names alone.

    Args:
        path: A file, or a folder of UTF-8 files; None takes the Python sources of the running
            interpreter, without tests and installed packages.
        min_bytes: The least number of bytes of each part.

    Returns:
        The corpus. One file in twenty, by the hash of its name, is held out; of a single file, or
        of a folder with too few, it is the last twentieth of the text.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if there is too little text.
    """
    if path is not None and not path.exists():
        raise FileNotFoundError(
            f"--data: expected a file or folder, got {path}, which is not there."
        )
    root = pathlib.Path(sysconfig.get_path("stdlib")) if path is None else path
    train: list[bytes] = []
    held_out: list[bytes] = []
    for name, file in text_files(root, "*.py" if path is None else "*"):
        text = file.read_bytes()
        if not is_text(text):
            continue
        digest = hashlib.sha256(name.encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0
        (held_out if is_held_out else train).append(text)
    parts = b"\n".join(train), b"\n".join(held_out)
    if min(map(len, parts)) < min_bytes:
        text = b"\n".join(train + held_out)
        cut = len(text) - max(len(text) // _HELD_OUT_ONE_IN, min_bytes)
        parts = text[: max(cut, 0)], text[max(cut, 0) :]
    if min(map(len, parts)) < min_bytes:
        raise ValueError(
            f"--data: expected at least {2 * min_bytes} bytes of UTF-8 text in {root}, got "
            f"{sum(map(len, parts))}; give more text or a shorter --seq-len."
        )
    arrays = [np.frombuffer(part, np.uint8) for part in parts]
    return Corpus(arrays[0], arrays[1], source=str(root))


def _windows(
    text: UInt8[np.ndarray, " bytes"], starts: np.ndarray, seq_len: int
) -> Int32[np.ndarray, "batch seq_plus_one"]:
    return text[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
