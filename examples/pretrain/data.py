"""Batches of packed rows on the mesh, by one global position.

Row number n of a run is row ``order(seed)[n]`` of the folder, in a new order for each epoch; a step
takes the next ``batch_size`` numbers. So the position, the number of rows taken so far, is all that a
checkpoint keeps, and any number of processes, with any mesh and batch size, goes on from it with the
same rows in the same places of the batch.

grain shuffles, repeats and reads ahead. Its ``ElasticIterator`` keeps the same position, but it deals
the rows of a batch out to processes in turn. Then the order inside a batch depends on the number of
processes, and two processes that hold the same rows, as on a mesh whose axis "expert" spans hosts,
would read different ones. Here each process asks the batch's sharding which rows its devices hold.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Self

import grain
import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int32

from examples.pretrain.rows import PARTS, Part, Summary

LocalBatch = dict[str, Int32[np.ndarray, "local_rows row"]]
Batch = dict[str, Int32[jax.Array, "batch row"]]

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


class Rows:
    """A folder of packed rows.

    Attributes:
        summary: What it holds.
    """

    def __init__(self, folder: pathlib.Path, *, seq_len: int, vocab_size: int) -> None:
        """Open ``folder``.

        Args:
            folder: As pack.py wrote it.
            seq_len: That of the configuration.
            vocab_size: That of the model.

        Raises:
            FileNotFoundError: if there are no rows.
            ValueError: if they do not fit the configuration.
        """
        self.summary = Summary.read(folder)
        if self.summary.seq_len != seq_len:
            raise ValueError(
                f"--data: expected rows for data.seq_len = {seq_len}, got {folder} with "
                f"{self.summary.seq_len}; pack again, or set data.seq_len={self.summary.seq_len}."
            )
        if self.summary.vocab_size > vocab_size:
            raise ValueError(
                f"--data: expected tokens of a vocabulary of model.vocab_size = {vocab_size}, got "
                f"{folder} with {self.summary.vocab_size}."
            )
        self._sources = {
            part: ArrayRecordDataSource(self.summary.paths(folder, part)) for part in PARTS
        }

    def order(self, seed: int) -> grain.MapDataset:
        """The training rows of all epochs, by their number; each epoch has an order of its own."""
        rows = grain.MapDataset.source(self._sources["train"]).seed(seed).shuffle().repeat(None)
        return rows.map(self.summary.decode)

    def held_out(self, first: int, count: int) -> list[dict[str, Int32[np.ndarray, " row"]]]:
        """Held-out rows by their numbers; past the last one they have no segments, so no targets."""
        return [self._row("held_out", number) for number in range(first, first + count)]

    def _row(self, part: Part, number: int) -> dict[str, Int32[np.ndarray, " row"]]:
        if number < self.summary.num_rows[part]:
            return self.summary.decode(self._sources[part][number])
        empty = np.zeros(self.summary.seq_len + 1, np.int32)
        return {"tokens": empty, "segments": empty}


class _LocalBatches:
    """The part of each batch that some devices hold: a sequence, which grain reads ahead."""

    def __init__(
        self, rows: grain.MapDataset, *, first: int, batch_size: int, local: np.ndarray
    ) -> None:
        self._rows, self._first, self._batch_size, self._local = rows, first, batch_size, local

    def __len__(self) -> int:
        return (sys.maxsize - self._first) // self._batch_size

    def __getitem__(self, index: int) -> LocalBatch:
        start = self._first + index * self._batch_size
        found: list[Any] = [self._rows[start + int(row)] for row in self._local]
        return _stack(found)


class Feed:
    """The batches of a run, from a position on, as arrays on the mesh. An iterator.

    Attributes:
        position: Rows taken so far, over all epochs.
    """

    def __init__(
        self,
        rows: Rows,
        sharding: jax.sharding.Sharding,
        *,
        batch_size: int,
        seed: int,
        position: int = 0,
    ) -> None:
        """Begin to read.

        Args:
            rows: The folder.
            sharding: Of a batch.
            batch_size: Rows of a batch, over all processes.
            seed: Of the order of rows.
            position: Rows that were taken before.
        """
        self.position = position
        self._layout = _Layout(sharding, (batch_size, rows.summary.seq_len + 1))
        local = _LocalBatches(
            rows.order(seed), first=position, batch_size=batch_size, local=self._layout.rows
        )
        self._batches = iter(grain.MapDataset.source(local).to_iter_dataset(_READ))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self._layout.put(next(self._batches))
        self.position += self._layout.shape[0]
        return batch

    def close(self) -> None:
        """End the threads that read ahead."""
        self._batches.close()


def held_out_batches(
    rows: Rows, sharding: jax.sharding.Sharding, *, batch_size: int, num_batches: int
) -> Iterator[Batch]:
    """The first held-out rows, the same ones each time; fewer batches where there are fewer rows."""
    layout = _Layout(sharding, (batch_size, rows.summary.seq_len + 1))
    needed = -(-rows.summary.num_rows["held_out"] // batch_size)
    for index in range(min(num_batches, needed)):
        batch = rows.held_out(index * batch_size, batch_size)
        yield layout.put(_stack([batch[row] for row in layout.rows]))


class _Layout:
    """Which rows of a batch the devices of this process hold.

    Attributes:
        shape: Of a batch, over all processes.
        rows: Their numbers in the batch, ascending.
    """

    def __init__(self, sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._sharding = sharding
        numbers = np.arange(shape[0])
        places = sharding.addressable_devices_indices_map(shape).values()
        held = [numbers[index[0]] for index in places if index is not None]
        self.rows = np.unique(np.concatenate(held))

    def put(self, local: LocalBatch) -> Batch:
        """A batch from the rows that this process holds."""

        def part(array: np.ndarray, index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self.shape[0])
            begin = int(np.searchsorted(self.rows, start))
            return array[begin : begin + stop - start, index[1]]

        def whole(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                self.shape, self._sharding, lambda index: part(array, index)
            )

        return {name: whole(array) for name, array in local.items()}


def _stack(rows: list[dict[str, np.ndarray]]) -> LocalBatch:
    return {name: np.stack([row[name] for row in rows]) for name in ("tokens", "segments")}
