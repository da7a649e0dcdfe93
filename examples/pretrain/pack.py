"""Packs text into rows of one length, ahead of training.

::

    python -m examples.pretrain.pack --data texts/ --tokenizer tokenizer.json --seq-len 4096 --out rows/

A document becomes its tokens and the token that ends it. One that is longer than a row is cut into
pieces, which overlap by one token, so that each token is once a target. Pieces go into the row with
the least room that takes them, among some that are open (best fit, as in Ding et al., "Fewer
truncations improve language modeling", 2024), so rows are nearly full and short documents stay whole.
Each piece is a segment of its row; attention and positions keep to it.

Documents are held out by a hash of their text, so equal ones are on the same side.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import numpy as np
import tokenizers
import typer

from examples.pretrain import tokenizer as tokenizer_file
from examples.pretrain.documents import documents
from examples.pretrain.rows import MOST_SEGMENTS, PARTS, Summary, Writer

_OPEN_ROWS = 64
_DOCUMENTS_AT_ONCE = 256  # which the tokenizer spreads over all cores
_ROWS_PER_FILE = 32_768


class Packer:
    """Puts pieces of documents into rows of ``length`` tokens."""

    def __init__(self, length: int, most_segments: int = MOST_SEGMENTS) -> None:
        """Begin without a row. Rows have ``most_segments`` pieces at most."""
        self._length, self._most_segments = length, most_segments
        self._open: list[list[Sequence[int]]] = []
        self._room: list[int] = []

    def add(self, document: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Add a document; yields the rows that are closed for it, as ``tokens, segments``."""
        for start in range(0, max(len(document) - 1, 1), self._length - 1):
            piece = document[start : start + self._length]
            if len(piece) < 2:  # no target
                continue
            fits = [
                row
                for row, room in enumerate(self._room)
                if room >= len(piece) and len(self._open[row]) < self._most_segments
            ]
            if fits:
                row = min(fits, key=self._room.__getitem__)
            else:
                if len(self._open) == _OPEN_ROWS:
                    yield self._close(min(range(_OPEN_ROWS), key=self._room.__getitem__))
                row = len(self._open)
                self._open.append([])
                self._room.append(self._length)
            self._open[row].append(piece)
            self._room[row] -= len(piece)

    def finish(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows that are still open."""
        while self._open:
            yield self._close(0)

    def _close(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._open.pop(row)
        self._room.pop(row)
        tokens, segments = np.zeros((2, self._length), np.int32)
        end = 0
        for segment, piece in enumerate(pieces, 1):
            start, end = end, end + len(piece)
            tokens[start:end] = piece
            segments[start:end] = segment
        return tokens, segments


def pack(
    texts: Iterable[str],
    tokenizer: tokenizers.Tokenizer,
    folder: pathlib.Path,
    *,
    seq_len: int,
    held_out: float,
    rows_per_file: int = _ROWS_PER_FILE,
    most_segments: int = MOST_SEGMENTS,
) -> Summary:
    """Write the rows of ``texts`` into ``folder``, which appears once it is whole.

    Args:
        texts: The documents.
        tokenizer: The tokenizer.
        folder: A folder that is not there yet.
        seq_len: S: rows have S + 1 tokens.
        held_out: The share of documents that are held out for evaluation.
        rows_per_file: Rows of a file at most.
        most_segments: Documents of a row at most.

    Returns:
        What was written.

    Raises:
        FileExistsError: if the folder is there.
        ValueError: if a part is empty.
    """
    if folder.exists():
        raise FileExistsError(f"--out: expected a folder that is not there yet, got {folder}.")
    if seq_len < 2 or not 0 < held_out < 1:
        raise ValueError(
            f"expected --seq-len of 2 or more and --held-out in (0, 1), got {seq_len}, {held_out}."
        )
    end = tokenizer_file.end_token(tokenizer)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    writer = Writer(
        partial,
        seq_len=seq_len,
        vocab_size=tokenizer.get_vocab_size(),
        end_token=end,
        rows_per_file=rows_per_file,
    )
    packers = {part: Packer(seq_len + 1, most_segments) for part in PARTS}
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _DOCUMENTS_AT_ONCE)):
        for text, encoded in zip(
            batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True
        ):
            part = "held_out" if _is_held_out(text, held_out) else "train"
            for row in packers[part].add([*encoded.ids, end]):
                writer.add(part, *row)
    for part, packer in packers.items():
        for row in packer.finish():
            writer.add(part, *row)
    summary = writer.close()
    for part in PARTS:
        if not summary.num_rows[part]:
            raise ValueError(
                f"--held-out: expected documents on both sides, got none in {part!r}; take another "
                f"share than {held_out} or more text."
            )
    tokenizer.save(str(partial / "tokenizer.json"))
    partial.rename(folder)
    return summary


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def main(
    out: Annotated[pathlib.Path, typer.Option(help="The folder to write, which is not there yet.")],
    tokenizer: Annotated[pathlib.Path, typer.Option(help="A file of the library tokenizers.")],
    seq_len: Annotated[int, typer.Option(help="Targets of a row, as data.seq_len.")],
    data: Annotated[
        list[pathlib.Path],
        typer.Option(help="Files or folders of text or JSONL; default: Python's library."),
    ] = [],  # noqa: B006  (typer reads it and changes nothing)
    field: Annotated[
        str, typer.Option(help="The field of a JSON line that has the text.")
    ] = "text",
    pattern: Annotated[str, typer.Option(help="What names of files in folders match.")] = "*",
    held_out: Annotated[float, typer.Option(help="Share of the documents for evaluation.")] = 0.01,
    rows_per_file: Annotated[int, typer.Option(min=1, help="At most.")] = _ROWS_PER_FILE,
    most_segments: Annotated[
        int, typer.Option(min=1, max=MOST_SEGMENTS, help="Documents of a row at most.")
    ] = MOST_SEGMENTS,
) -> None:
    """Pack text into rows of one length."""
    try:
        summary = pack(
            documents(data, field=field, pattern=pattern),
            tokenizer_file.load(tokenizer),
            out,
            seq_len=seq_len,
            held_out=held_out,
            rows_per_file=rows_per_file,
            most_segments=most_segments,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"pack: {error}", err=True)
        raise typer.Exit(2) from error
    for part in PARTS:
        rows, targets = summary.num_rows[part], summary.num_targets[part]
        typer.echo(f"{part}: {rows} rows, {targets} targets, {targets / (rows * seq_len):.1%} full")


if __name__ == "__main__":
    typer.run(main)
