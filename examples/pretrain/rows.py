"""The folder of packed rows: what pack.py writes and data.py reads.

A row is a record of an ArrayRecord file, so any row is found by its number: grain shuffles without
reading, and a run goes on from any position. A record has the row's S + 1 tokens (uint16, or uint32
for more than 65,536 of them), then its S + 1 segments (uint16), little-endian. ``rows.json`` says the
rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32

Part = str  # "train" or "held_out"
PARTS = ("train", "held_out")
_SEGMENT = np.dtype("<u2")
MOST_SEGMENTS = 65_535


@dataclasses.dataclass(frozen=True)
class Summary:
    """What ``rows.json`` says.

    Attributes:
        seq_len: S: a row has S + 1 tokens, so S targets at most.
        vocab_size: Tokens of the tokenizer.
        end_token: The id of the token that ends a document.
        num_rows: Rows of each part.
        num_targets: Targets of each part.
        num_files: Files of each part.
        digest: A hash of all rows.
        most_segments: Documents of the row with the most of them.
    """

    seq_len: int
    vocab_size: int
    end_token: int
    num_rows: dict[Part, int]
    num_targets: dict[Part, int]
    num_files: dict[Part, int]
    digest: str
    most_segments: int = MOST_SEGMENTS

    @classmethod
    def read(cls, folder: pathlib.Path) -> Self:
        """Read it from a folder.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = folder / "rows.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"--data: expected a folder of packed rows, got {folder}, which has no rows.json; "
                "python -m examples.pretrain.pack makes one."
            )
        return cls(**json.loads(path.read_text()))

    def paths(self, folder: pathlib.Path, part: Part) -> list[str]:
        """The files of a part, in order."""
        return [str(_path(folder, part, index)) for index in range(self.num_files[part])]

    def decode(self, record: bytes) -> dict[str, Int32[np.ndarray, " row"]]:
        """``tokens`` and ``segments`` of a record."""
        dtype, length = _token_dtype(self.vocab_size), self.seq_len + 1
        tokens = np.frombuffer(record, dtype, length)
        segments = np.frombuffer(record, _SEGMENT, length, offset=tokens.nbytes)
        return {"tokens": tokens.astype(np.int32), "segments": segments.astype(np.int32)}


class Writer:
    """Writes the rows of a folder. ``close`` writes ``rows.json`` last: a folder with it is whole."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        seq_len: int,
        vocab_size: int,
        end_token: int,
        rows_per_file: int,
    ) -> None:
        """Begin in ``folder``, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rows_per_file = folder, rows_per_file
        self._seq_len, self._vocab_size, self._end_token = seq_len, vocab_size, end_token
        self._files: dict[Part, ArrayRecordWriter] = {}
        self._counts = {what: dict.fromkeys(PARTS, 0) for what in ("rows", "targets", "files")}
        self._most_segments = 0
        self._digests = {part: hashlib.sha256() for part in PARTS}

    def add(
        self, part: Part, tokens: Int32[np.ndarray, " row"], segments: Int32[np.ndarray, " row"]
    ) -> None:
        """Append a row to a part."""
        rows, files = self._counts["rows"], self._counts["files"]
        if rows[part] % self._rows_per_file == 0:
            if part in self._files:
                self._files.pop(part).close()
            # Groups of one record, since rows are read one by one and in any order.
            path = _path(self._folder, part, files[part])
            self._files[part] = ArrayRecordWriter(str(path), "group_size:1")
            files[part] += 1
        record = tokens.astype(_token_dtype(self._vocab_size)).tobytes()
        record += segments.astype(_SEGMENT).tobytes()
        self._files[part].write(record)
        self._digests[part].update(record)
        rows[part] += 1
        self._most_segments = max(self._most_segments, int(segments.max()))
        self._counts["targets"][part] += int(
            ((segments[1:] == segments[:-1]) & (segments[1:] != 0)).sum()
        )

    def close(self) -> Summary:
        """Finish the files."""
        for file in self._files.values():
            file.close()
        digest = hashlib.sha256(b"".join(self._digests[part].digest() for part in PARTS))
        summary = Summary(
            seq_len=self._seq_len,
            vocab_size=self._vocab_size,
            end_token=self._end_token,
            num_rows=self._counts["rows"],
            num_targets=self._counts["targets"],
            num_files=self._counts["files"],
            digest=digest.hexdigest(),
            most_segments=self._most_segments,
        )
        (self._folder / "rows.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2))
        return summary


def _path(folder: pathlib.Path, part: Part, index: int) -> pathlib.Path:
    return folder / f"{part}-{index:05d}.array_record"


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
