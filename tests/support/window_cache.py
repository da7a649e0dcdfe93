"""A compilation cache for another machine: how processes use it, and its parts of bounded size.

One GPU fills it. A program of two ranks is the same, and compiled to the same, whether two
processes share a GPU, have one each, or one process has both. So ``cache_plugin`` gives all of them
one key. A key still contains the program, the versions of jaxlib and CUDA, ``XLA_FLAGS``, and the
kind of GPU.
"""

from __future__ import annotations

import collections
import pathlib
import tarfile
from collections.abc import Container, Iterable

import machine

PLUGIN = pathlib.Path(__file__).with_name("cache_plugin")
PART_BYTES = 14 << 20
MOST_PARTS = 4


def environment(folder: pathlib.Path, lookups: pathlib.Path) -> dict[str, str]:
    """Environment of processes that use the cache in ``folder``, besides ``python_path``.

    Args:
        folder: The folder of the entries; it need not exist.
        lookups: A folder for the files that ``found_and_missed`` reads.
    """
    lookups.mkdir(parents=True, exist_ok=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_EP_WINDOW_LOOKUPS": str(lookups / "process"),
        "JAX_EP_TEST_SAME_PROGRAMS": "1",  # see spmd.py
    }


def found_and_missed(lookups: pathlib.Path) -> tuple[int, int, list[str]]:
    """Numbers of programs that processes found and missed, and the names of the missed ones."""
    found, missed = 0, collections.Counter[str]()
    for path in lookups.glob("process.*"):
        for line in path.read_text().splitlines():
            what, _, key = line.partition(" ")
            if what == "found":
                found += 1
            else:
                missed[key.rpartition("-")[0]] += 1
    return found, missed.total(), [name for name, _ in missed.most_common()]


def used(lookups: Iterable[pathlib.Path]) -> set[str]:
    """Keys of all programs that processes looked for, found or not."""
    return {
        line.partition(" ")[2]
        for folder in lookups
        for path in folder.glob("process.*")
        for line in path.read_text().splitlines()
    }


def pack(
    folder: pathlib.Path,
    parts: pathlib.Path,
    part_bytes: int = PART_BYTES,
    first: Container[str] = (),
) -> str:
    """Write the entries into tar files ``cache-N.tgz`` of bounded size; gives a summary.

    Those with keys in ``first`` come first, and small ones before large ones. Where ``MOST_PARTS`` do
    not suffice for all, the last ones are left out.
    """
    parts.mkdir(parents=True, exist_ok=True)
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".part", "-atime"))
    ]
    sizes = {path: _tar_bytes(path.stat().st_size) for path in paths}
    groups: list[list[pathlib.Path]] = [[]]
    used = left_out = 0

    def order(path: pathlib.Path) -> tuple[bool, int, str]:
        return path.name.removesuffix("-cache") not in first, sizes[path], path.name

    for path in sorted(paths, key=order):
        if used + sizes[path] > part_bytes - tarfile.RECORDSIZE and groups[-1]:
            groups.append([])
            used = 0
        if len(groups) > MOST_PARTS or sizes[path] > part_bytes - tarfile.RECORDSIZE:
            left_out += 1
            continue
        groups[-1].append(path)
        used += sizes[path]
    groups = [group for group in groups[:MOST_PARTS] if group]
    for number, group in enumerate(groups):
        part = parts / f"cache-{number}.tgz.part"
        # Entries are compressed already; this is for the headers and the padding between them.
        with tarfile.open(part, "w:gz", compresslevel=1) as tar:
            for path in group:
                tar.add(path, arcname=str(path.relative_to(folder)))
        part.replace(parts / f"cache-{number}.tgz")
    for stale in parts.glob("cache-*.tgz"):
        if int(stale.stem.partition("-")[2]) >= len(groups):
            stale.unlink()
    text = (
        f"{len(paths) - left_out} entries in {len(groups)} part(s), {sum(sizes.values()) >> 10} KiB"
    )
    return f"{text}, {left_out} left out" if left_out else text


def unpack(parts: pathlib.Path, folder: pathlib.Path) -> int:
    """Bring the entries of all parts into a folder; gives the number of files there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(parts.glob("cache-*.tgz")):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    return sum(path.is_file() for path in folder.rglob("*"))


def python_path(root: pathlib.Path) -> str:
    """``PYTHONPATH`` of processes that use the cache."""
    return machine.python_path(root, root / "tests", root / "tests" / "support", PLUGIN)


def _tar_bytes(size: int) -> int:
    """The bytes that a file takes in a tar file: headers, a long name, and whole blocks."""
    return 4 * tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
