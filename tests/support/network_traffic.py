"""What groups that span hosts must send over the network: ``tests/cuda/network_traffic.h``, compiled.

The emulator's test of the kernels uses the same header, so both check the same formula.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import pathlib
import subprocess
import tempfile

import numpy as np

_ROOT = pathlib.Path(__file__).parents[2]
_SOURCE = _ROOT / "tests" / "cuda" / "network_traffic.cc"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a rank sends to its counterpart on one other host.

    Attributes:
        puts: Puts, each with a signal.
        put_bytes: Their bytes.
        signals: Signals, those of puts too.
    """

    puts: int = 0
    put_bytes: int = 0
    signals: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(a + b for a, b in pairs))

    def __sub__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(a - b for a, b in pairs))


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="jax_ep-") as folder:
        path = pathlib.Path(folder, "network_traffic.so")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{_ROOT / 'csrc'}"]
        subprocess.run([*command, _SOURCE, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    library.Crossings.restype = ctypes.c_int64
    return library


def of_plan(num_tokens: int, top_k: int) -> Traffic:
    """The choices of ``num_tokens`` tokens."""
    out = (ctypes.c_int64 * 3)()
    _library().OfPlan(num_tokens, top_k, out)
    return Traffic(*out)


def of_dispatch(
    choices: np.ndarray,
    *,
    host: int,
    hosts: int,
    num_experts: int,
    row_bytes: int,
    chunk_bytes: int,
    lanes: int = 1,
) -> Traffic:
    """The rows of a rank, with weights, for a host; ``choices`` are its ``[T, K]`` experts.

    ``lanes`` are those in use between two hosts; if rows are short, chunks do not depend on them.
    """
    num_tokens, top_k = choices.shape
    in_chunk = _library().DispatchRowBytes(row_bytes, 0, top_k)
    rows = _crossings(choices, num_experts // hosts, host)
    return _rows(chunk_bytes, lanes, num_tokens, in_chunk, rows)


def of_combine(
    choices: np.ndarray,
    *,
    host: int,
    hosts: int,
    num_experts: int,
    row_bytes: int,
    chunk_bytes: int,
    lanes: int = 1,
) -> Traffic:
    """The sums of a host for a rank of another one, if no row was dropped, and without values."""
    in_chunk = _library().CombineRowBytes(row_bytes, 0)
    rows = _crossings(choices, num_experts // hosts, host)
    return _rows(chunk_bytes, lanes, len(choices), in_chunk, rows)


def _crossings(choices: np.ndarray, experts_per_host: int, host: int) -> int:
    given = np.ascontiguousarray(choices, np.int32)
    pointer = given.ctypes.data_as(ctypes.c_void_p)
    return _library().Crossings(pointer, *given.shape, experts_per_host, host)


def _rows(chunk_bytes: int, lanes: int, num_tokens: int, row_bytes: int, num_rows: int) -> Traffic:
    out = (ctypes.c_int64 * 3)()
    _library().OfRows(chunk_bytes, lanes, num_tokens, row_bytes, ctypes.c_int64(num_rows), out)
    return Traffic(*out)
