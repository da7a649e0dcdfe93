"""Batches of packed rows on the mesh, by one global position.

Row number n of a run is row ``order(seed)[n]`` of the folder, in a new order for each epoch; a step
takes the next ``batch_size`` numbers. So the position, the number of rows taken so far, is all that a
checkpoint keeps, and any number of processes, with any mesh and batch size, goes on from it with the
same rows in the same places of the batch.

Several folders are a mixture: each is shuffled and repeated by itself, and row n comes from one of them
in a fixed pattern with the shares of their weights. Which row that is depends on n alone, so the one
position is enough.

grain shuffles, mixes, repeats and reads ahead. Its ``ElasticIterator`` keeps the same position, but
it deals the rows of a batch out to processes in turn. Then the order inside a batch depends on the
number of processes, and two processes that hold the same rows, as on a mesh whose axis "expert" spans
hosts, would read different ones. Here each process asks the batch's sharding which rows its devices
hold.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import grain
import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int32

from examples.pretrain.rows import PARTS, Part, Summary

LocalBatch = dict[str, Int32[np.ndarray, "local_rows row"]]
Batch = dict[str, Int32[jax.Array, "batch row"]]

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


class Source(NamedTuple):
    """A folder of packed rows, and how much of a mixture it is.

    Attributes:
        folder: As pack.py wrote it.
        weight: Rows of it for each row of a source with weight 1; more than 0.
    """

    folder: pathlib.Path
    weight: float = 1.0


class Rows:
    """Packed rows of a folder, or of a mixture of several.

    Attributes:
        summary: What it holds. Of a mixture: the sums over its folders, and as held-out rows so many
            that no folder has too few of them for its weight.
    """

    def __init__(
        self, data: pathlib.Path | Sequence[Source], *, seq_len: int, vocab_size: int
    ) -> None:
        """Open the folders.

        Args:
            data: A folder, or the sources of a mixture, whose shares are right to one in a hundred.
            seq_len: That of the configuration.
            vocab_size: That of the model.

        Raises:
            FileNotFoundError: if there are no rows.
            ValueError: if they do not fit the configuration or each other.
        """
        sources = [Source(data)] if isinstance(data, pathlib.Path) else list(data)
        self._folders = [_Folder(source.folder, seq_len, vocab_size) for source in sources]
        self._weights = [source.weight for source in sources]
        _check_tokenizers(sources)
        self._stored = {
            part: self._mixed(
                [folder.records[part].map(folder.summary.decode) for folder in self._folders]
            )
            for part in PARTS
        }
        self.summary = self._summary()

    def order(self, seed: int) -> grain.MapDataset:
        """The training rows of all epochs, by their number; each epoch has an order of its own."""
        orders = []
        for index, folder in enumerate(self._folders):
            # Folders of equally many rows have different orders.
            rows = folder.records["train"].seed((seed + 1_000_003 * index) % 2**32)
            orders.append(rows.shuffle().repeat(None).map(folder.summary.decode))
        return self._mixed(orders)

    def held_out(self, first: int, count: int) -> list[dict[str, Int32[np.ndarray, " row"]]]:
        """Held-out rows by their numbers; past the last one they have no segments, so no targets."""
        return [self._row("held_out", number) for number in range(first, first + count)]

    def _row(self, part: Part, number: int) -> dict[str, Int32[np.ndarray, " row"]]:
        if number < self.summary.num_rows[part]:
            return self._stored[part][number]
        empty = np.zeros(self.summary.seq_len + 1, np.int32)
        return {"tokens": empty, "segments": empty}

    def _mixed(self, parts: list[grain.MapDataset]) -> grain.MapDataset:
        return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, self._weights)

    def _summary(self) -> Summary:
        summaries = [folder.summary for folder in self._folders]
        if len(summaries) == 1:
            return summaries[0]
        identity = json.dumps([s.digest for s in summaries] + self._weights)

        def sums(name: str) -> dict[Part, int]:
            return {part: sum(getattr(s, name)[part] for s in summaries) for part in PARTS}

        return Summary(
            seq_len=summaries[0].seq_len,
            vocab_size=max(s.vocab_size for s in summaries),
            end_token=summaries[0].end_token,
            num_rows=sums("num_rows") | {"held_out": len(self._stored["held_out"])},
            num_targets=sums("num_targets"),
            num_files=sums("num_files"),
            digest=hashlib.sha256(identity.encode()).hexdigest(),
            most_segments=max(s.most_segments for s in summaries),
        )


class _Folder:
    """One folder of packed rows.

    Attributes:
        summary: What it holds.
        records: The records of each part, as they are stored.
    """

    def __init__(self, folder: pathlib.Path, seq_len: int, vocab_size: int) -> None:
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
        self.records = {
            part: grain.MapDataset.source(ArrayRecordDataSource(self.summary.paths(folder, part)))
            for part in PARTS
        }


def _check_tokenizers(sources: Sequence[Source]) -> None:
    """Raise unless all folders have the same tokenizer."""
    first, *others = ((source.folder, source.folder / "tokenizer.json") for source in sources)
    for folder, path in others:
        if path.read_bytes() != first[1].read_bytes():
            raise ValueError(
                f"--data: expected rows of one tokenizer, got {first[0]} and {folder} with two; pack "
                "them with the same --tokenizer."
            )


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
