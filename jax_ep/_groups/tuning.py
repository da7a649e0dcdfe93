"""How many SMs an op takes, and up to how many tokens latency mode: what was found, or defaults.

``python -m jax_ep.tune`` finds both. They decide, while an op is traced, which call it is and which
attributes that has, so they must be the same on all ranks. A group reads the cache when it is created;
where its mesh spans processes, all take the table of the process of rank 0.

The cache is a JSON file, ``$JAX_EP_TUNING_CACHE`` or ``jax_ep/tuning.json`` in the user's cache
directory (``$XDG_CACHE_HOME``, else ``~/.cache``)::

    {"format": 1, "entries": [{"device_kind": "NVIDIA H200", "ranks": 2, "op": "dispatch",
        "layout": "token", "rows": "bfloat16", "hidden": 7168, "tokens": 4096, "num_sms": 20,
        "median_us": 187.0, "versions": {"jax_ep": "0.1.0", "jax": "0.11.2"}}],
     "crossovers": [{"device_kind": "NVIDIA H200", "ranks": 2, "op": "dispatch",
        "layout": "token", "rows": "bfloat16", "hidden": 7168, "most_tokens": 512,
        "median_us": {"128": {"latency": 14.9, "throughput": 25.9}},
        "versions": {"jax_ep": "0.1.0", "jax": "0.11.2"}}]}

A file may lack "crossovers", as those of versions without latency mode do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from jax_ep import _compat
from jax_ep._core.types import Layout
from jax_ep._version import __version__

TunedOp = Literal["plan", "dispatch", "combine"]

CACHE_VARIABLE = "JAX_EP_TUNING_CACHE"
_FORMAT = 1
_DEFAULT_SMS = {"expert": 64, "token": 24}
# The most tokens of a rank for which latency mode was faster (two H200s, H = 7168, top-8, "token").
DEFAULT_CROSSOVERS = {"dispatch": 512, "combine": 256}
_FREE_SMS = 32  # for kernels that wait too, such as NCCL's, and for compute
_FEWEST_SMS = 2
_BROADCAST_TIMEOUT_S = 600.0

logger = logging.getLogger("jax_ep")

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tuned number holds for.

    Attributes:
        device_kind: As JAX names the GPU.
        ranks: R of the group.
        op: "plan", "dispatch" or "combine".
        layout: "expert" or "token".
        rows: What is moved, by ``rows_name``.
        hidden: H.
        tokens: T of a rank, rounded up to a power of two.
    """

    device_kind: str
    ranks: int
    op: str
    layout: str
    rows: str
    hidden: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class CrossoverKey:
    """What a crossover between latency and throughput mode holds for; its value is a number of tokens.

    Attributes:
        device_kind: As JAX names the GPU.
        ranks: R of the group.
        op: "dispatch" or "combine".
        layout: "expert" or "token".
        rows: What is moved, by ``rows_name``.
        hidden: H.
    """

    device_kind: str
    ranks: int
    op: str
    layout: str
    rows: str
    hidden: int


Table = Mapping[Key | CrossoverKey, int]


class Contents(NamedTuple):
    """The entries of a cache, as its JSON has them.

    Attributes:
        entries: Numbers of SMs.
        crossovers: Numbers of tokens up to which latency mode is faster.
    """

    entries: list[dict[str, Any]]
    crossovers: list[dict[str, Any]]


def default_num_sms(layout: Layout, sm_count: int | None) -> int:
    """The number of SMs where nothing was tuned.

    24 blocks keep an NVLink port busy with one row per (token, rank), measured on H200: 8 suffice to
    fill the link in one direction, the rest hide its latency. Layout "expert" also writes each row
    to all its local experts, which takes local bandwidth that 64 blocks reach. 32 SMs always stay
    free for computation and for other kernels that wait, such as NCCL's, so smaller GPUs get less.

    Args:
        layout: "expert" or "token".
        sm_count: SMs of the GPU; None where it is unknown.

    Returns:
        A number from 2 on.
    """
    return clamp_num_sms(_DEFAULT_SMS[layout], sm_count)


def clamp_num_sms(wanted: int, sm_count: int | None) -> int:
    """``wanted``, or less where it would not leave 32 of ``sm_count`` SMs free."""
    most = wanted if sm_count is None else sm_count - _FREE_SMS
    return max(min(wanted, most), _FEWEST_SMS)


def rows_name(dtype: Any, scale_format: str | None = None, dense_output: bool = True) -> str:
    """What an op moves, as keys of the table name it.

    "bfloat16"; "float8_e4m3fn" for ``Quantized`` rows; "bfloat16 as fp8" for rows that are cast on
    their way and received ``Quantized``, "bfloat16 through fp8" if they are received dense.
    """
    name = jax.numpy.dtype(dtype).name
    if scale_format is None:
        return name
    return f"{name} {'through' if dense_output else 'as'} fp8"


def tokens_bucket(num_tokens: int) -> int:
    """The least power of two that is not below ``num_tokens``."""
    return 1 << max(num_tokens - 1, 0).bit_length()


def cache_path() -> pathlib.Path:
    """Where the cache is."""
    if path := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(path)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "jax_ep/tuning.json"


def load(path: pathlib.Path | None = None) -> dict[Key | CrossoverKey, int]:
    """The table of a cache file; empty, with one warning, if the file cannot be used."""
    path = cache_path() if path is None else path
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _warn(path, str(error))
        return {}
    try:
        return _table(contents_of(text))
    except ValueError as error:
        _warn(path, str(error))
        return {}


def contents_of(text: str) -> Contents:
    """The entries in a cache's text, all of them checked.

    Raises:
        ValueError: where it is not one of ours.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is no cache of format {_FORMAT}")
    lists = {"entries": content.get("entries"), "crossovers": content.get("crossovers", [])}
    for name, entries in lists.items():
        if not isinstance(entries, list):
            raise ValueError(f"it has no list of {name}")
    found = Contents(**lists)
    for entry in found.entries:
        _check_entry(entry, Key)
        if type(entry.get("num_sms")) is not int or entry["num_sms"] < 1:
            raise ValueError(f"an entry's num_sms is no positive number: {entry!r}")
    for entry in found.crossovers:
        _check_entry(entry, CrossoverKey)
        if type(entry.get("most_tokens")) is not int or entry["most_tokens"] < 0:
            raise ValueError(f"an entry's most_tokens is no number of tokens: {entry!r}")
    return found


def _check_entry(entry: Any, key: type[Key | CrossoverKey]) -> None:
    """Raise ``ValueError`` unless ``entry`` has the fields of a key and is of this version."""
    if not isinstance(entry, dict) or not all(
        type(entry.get(field.name)) is (int if field.type == "int" else str)
        for field in dataclasses.fields(key)
    ):
        raise ValueError(f"an entry has not the fields of a key: {entry!r}")
    if not isinstance(entry.get("versions"), dict) or "jax_ep" not in entry["versions"]:
        raise ValueError(f"an entry does not say which jax_ep it is for: {entry!r}")
    if entry["versions"]["jax_ep"] != __version__:
        raise ValueError(
            f"it was made for jax_ep {entry['versions']['jax_ep']}, and this is {__version__}"
        )


def save(
    path: pathlib.Path, entries: list[dict[str, Any]], crossovers: Sequence[dict[str, Any]] = ()
) -> None:
    """Write a cache; readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = ", ".join(
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(entry) for entry in found) + "\n]"
        for name, found in (("entries", entries), ("crossovers", crossovers))
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(f'{{"format": {_FORMAT}, {lists}}}\n')
    partial.replace(path)


def key_of(entry: Mapping[str, Any]) -> Key:
    """What an entry holds for."""
    return Key(**{field.name: entry[field.name] for field in dataclasses.fields(Key)})


def crossover_key_of(entry: Mapping[str, Any]) -> CrossoverKey:
    """What a crossover holds for."""
    fields = dataclasses.fields(CrossoverKey)
    return CrossoverKey(**{field.name: entry[field.name] for field in fields})


def agreed_table(
    mesh: jax.sharding.Mesh, name: str, processes: Sequence[int] | None = None
) -> dict[Key | CrossoverKey, int]:
    """The table of the process of ``mesh``'s first device, in all processes of the mesh.

    Args:
        mesh: The mesh; all its processes must call this.
        name: Of this agreement and no other, the same in all processes.
        processes: Those that take part, whose first device counts; None: all.
    """
    owners = [device.process_index for device in mesh.devices.flat]
    owners = [owner for owner in owners if processes is None or owner in processes]
    first = owners[0]
    if all(owner == first for owner in owners):
        return load()
    text = None
    if jax.process_index() == first:
        rows = [
            (type(key).__name__, dataclasses.asdict(key), value) for key, value in load().items()
        ]
        text = json.dumps(rows)
    told = _compat.broadcast_text(f"jax_ep/tuning/{name}", text, timeout=_BROADCAST_TIMEOUT_S)
    kinds = {kind.__name__: kind for kind in (Key, CrossoverKey)}
    return {kinds[kind](**fields): value for kind, fields, value in json.loads(told)}


def _table(contents: Contents) -> dict[Key | CrossoverKey, int]:
    table: dict[Key | CrossoverKey, int] = {}
    table |= {key_of(entry): entry["num_sms"] for entry in contents.entries}
    return table | {crossover_key_of(entry): entry["most_tokens"] for entry in contents.crossovers}


def _warn(path: pathlib.Path, reason: str) -> None:
    if str(path) not in _warned:
        _warned.add(str(path))
        logger.warning(
            "the tuning cache %s is ignored: %s; run python -m jax_ep.tune again, or remove it",
            path,
            reason,
        )
