"""Documents: every text file, and every line of the JSONL files, of some folders."""

from __future__ import annotations

import gzip
import json
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from examples.common.texts import is_text, text_files

_JSONL = (".jsonl", ".jsonl.gz")


def documents(
    folders: Sequence[pathlib.Path], *, field: str = "text", pattern: str = "*"
) -> Iterator[str]:
    """All documents, in an order that depends on the folders and on file names alone.

    Args:
        folders: Folders or files. A file that ends with .jsonl or .jsonl.gz has a document in each
            line, and any other UTF-8 file is one document; files that are not text are left out.
            Without folders it is Python's own library, so that an example needs no data.
        field: The field of a JSON object that has the text.
        pattern: What names of files in folders match, such as "*.py".

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if a line is not a JSON object with the field, or there is no document at all.
    """
    roots = list(folders)
    if not roots:
        roots, pattern = [pathlib.Path(sysconfig.get_path("stdlib"))], "*.py"
    found = False
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"expected a file or folder of text, got {root}, not there.")
        for name, file in text_files(root, pattern):
            for document in _of_file(name, file, field):
                found = True
                yield document
    if not found:
        raise ValueError(f"expected text in {', '.join(map(str, roots))}, got none.")


def _of_file(name: str, file: pathlib.Path, field: str) -> Iterator[str]:
    if not name.endswith(_JSONL):
        content = file.read_bytes()
        if is_text(content):
            yield content.decode()
        return
    with gzip.open(file, "rt") if name.endswith(".gz") else file.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected a JSON object with the field {field!r}, got "
                    f"{line[:60]!r}; --field names another."
                ) from error
            if not isinstance(text, str):
                raise ValueError(
                    f"{file}, line {number}: expected text in {field!r}, got {text!r}."
                )
            if text:
                yield text
