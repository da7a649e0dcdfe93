"""``python -m jax_ep.tune``: finds the best numbers of SMs for dispatch and combine here.

It times each op with several numbers of SMs on the GPUs here, as the benchmarks do, and writes the
best into the tuning cache, which groups read when they are created (``jax_ep._groups.tuning``). Of
the numbers within two percent of the best it takes the smallest, because computation can use the
other SMs.

It also times both modes with few tokens, each with the number of SMs that it takes by itself, and
writes up to how many tokens latency mode is faster, which is where ``DispatchConfig(mode="auto")``
takes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

try:
    import rich.console
    import rich.table
    import typer
except ImportError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f"jax_ep.tune: {package} is not installed: pip install 'jax-ep[bench]'")

from jax_ep._groups import tuning
from jax_ep._groups.latency_mode import MOST_ENTRIES, MOST_TOKENS
from jax_ep.bench import launch
from jax_ep.bench.__main__ import listed, measure
from jax_ep.bench.cases import Case
from jax_ep.bench.machine import check_processes, count_gpus

_CANDIDATES = "8,12,16,20,24,28,32,40,48,64,80,100"
_QUANTIZATIONS = "none,quantized,fp8"
_CROSSOVER_TOKENS = "1,16,64,128,256,512"
_SLACK = 1.02


def main(
    tokens: Annotated[str, typer.Option(help="Of each rank.")] = "128,4096",
    hidden: Annotated[str, typer.Option()] = "7168",
    top_k: Annotated[int, typer.Option()] = Case.top_k,
    experts: Annotated[int, typer.Option(help="Over all ranks.")] = Case.experts,
    layout: Annotated[str, typer.Option(help="expert, token or both.")] = "expert,token",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="As in jax_ep.bench.")] = _QUANTIZATIONS,
    num_sms: Annotated[str, typer.Option(help="Numbers of SMs to try.")] = _CANDIDATES,
    crossover: Annotated[
        str, typer.Option(help='Tokens of each rank to time both modes with; "" for none.')
    ] = _CROSSOVER_TOKENS,
    ranks: Annotated[int | None, typer.Option(help="All GPUs.")] = None,
    processes: Annotated[int, typer.Option(help="1, or one for each rank.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 50,
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = 300.0,
    cache: Annotated[
        pathlib.Path | None, typer.Option(help=f"Instead of ${tuning.CACHE_VARIABLE}.")
    ] = None,
) -> None:
    """Find good numbers of SMs and up to where latency mode pays. Options may be lists.

    The results go into the tuning cache.
    """
    gpus = count_gpus()
    if gpus == 0:
        sys.exit("jax_ep.tune: there is no GPU here; on CPU the number of SMs has no meaning")
    count = ranks or max(gpus, processes)
    try:
        base = Case(top_k=top_k, experts=experts)
        grid: dict[str, Any] = {
            "hidden": [int(value) for value in listed("--hidden", hidden)],
            "layouts": listed("--layout", layout, ("expert", "token")),
            "dtypes": listed("--dtype", dtype, ("bfloat16", "float16", "float32")),
            "quantizations": listed("--quantization", quantization),
        }
        cases = cases_of(
            base,
            tokens=[int(value) for value in listed("--tokens", tokens)],
            candidates=[int(value) for value in listed("--num-sms", num_sms)],
            **grid,
        )
        few = [int(value) for value in listed("--crossover", crossover)]
        of_modes = crossover_cases(base, ranks=count, tokens=few, **grid)
        check_processes(count, processes, gpus)
        for case in (cases + of_modes)[:1]:
            case.check_ranks(count)
    except (ValueError, IndexError) as error:
        raise typer.BadParameter(str(error)) from error
    console = rich.console.Console()
    path = tuning.cache_path() if cache is None else cache
    kept = entries_to_keep(path, console)
    job = launch.Job(
        cases=cases + of_modes,
        ranks=count,
        processes=processes,
        gpus=gpus,
        repeat=repeat,
        command="python -m jax_ep.tune " + shlex.join(sys.argv[1:]),
    )

    def save(records: list[dict[str, Any]]) -> None:
        """Save what is known by now, so that a run that is ended early keeps its results."""
        found = tuning.Contents(
            best_entries(records, tried=len({case.num_sms for case in cases})),
            best_crossovers(records, tried=len({(case.mode, case.tokens) for case in of_modes})),
        )
        if any(found):
            tuning.save(path, *merged(kept, found))

    records = measure(job, timeout=timeout, console=console, save=save)
    found = tuning.Contents(best_entries(records), best_crossovers(records))
    if not any(found):
        sys.exit("jax_ep.tune: no op gave a right result in time; see python -m jax_ep.bench")
    tuning.save(path, *merged(kept, found))
    _show(console, path, found)


def _show(console: rich.console.Console, path: pathlib.Path, found: tuning.Contents) -> None:
    table = rich.table.Table(title=f"written to {path}")
    for column in ("op", "layout", "rows", "tokens", "hidden", "SMs", "us"):
        table.add_column(column)
    for entry in found.entries:
        table.add_row(
            *(str(entry[field]) for field in ("op", "layout", "rows", "tokens", "hidden")),
            str(entry["num_sms"]),
            f"{entry['median_us']:.1f}",
        )
    if found.entries:
        console.print(table)
    table = rich.table.Table(title=f"latency mode, written to {path}")
    for column in ("op", "layout", "rows", "hidden", "up to tokens", "us of latency / throughput"):
        table.add_column(column)
    for entry in found.crossovers:
        times = entry["median_us"].items()
        table.add_row(
            *(str(entry[field]) for field in ("op", "layout", "rows", "hidden", "most_tokens")),
            ", ".join(f"{t}: {us['latency']:.1f} / {us['throughput']:.1f}" for t, us in times),
        )
    if found.crossovers:
        console.print(table)


def cases_of(
    base: Case,
    *,
    tokens: list[int],
    hidden: list[int],
    layouts: list[str],
    dtypes: list[str],
    quantizations: list[str],
    candidates: Sequence[int | None],
) -> list[Case]:
    """Every combination that makes sense; rows come home in full precision only."""
    grid = itertools.product(tokens, hidden, layouts, dtypes, quantizations)
    changes: Iterable[dict[str, Any]] = (
        {
            "tokens": t,
            "hidden": h,
            "layout": layout,
            "dtype": dtype,
            "quantization": q,
            "op": op,
            "num_sms": sms,
        }
        for t, h, layout, dtype, q in grid
        for op in ("dispatch", "combine")
        for sms in candidates
        if op == "dispatch" or q == "none"
    )
    return [dataclasses.replace(base, **change) for change in changes]


def crossover_cases(
    base: Case,
    *,
    ranks: int,
    tokens: list[int],
    hidden: list[int],
    layouts: list[str],
    dtypes: list[str],
    quantizations: list[str],
) -> list[Case]:
    """Both modes of every op and number of tokens that latency mode has room for; nothing is padded."""
    fitting = [t for t in tokens if t <= min(MOST_TOKENS, MOST_ENTRIES // (ranks * base.top_k))]
    base = dataclasses.replace(base, alignment=1)
    grid: dict[str, Any] = {"hidden": hidden, "layouts": layouts, "dtypes": dtypes}
    cases = cases_of(base, tokens=fitting, quantizations=quantizations, candidates=[None], **grid)
    return [
        dataclasses.replace(case, mode=mode) for case in cases for mode in ("latency", "throughput")
    ]


def best_entries(records: list[dict[str, Any]], tried: int = 1) -> list[dict[str, Any]]:
    """An entry of the cache for each key, from the right records of jax_ep's kernels alone.

    Args:
        records: Records of the benchmarks.
        tried: Records that a key must have, right or wrong, to get an entry.
    """
    by_key: dict[tuning.Key, list[dict[str, Any]]] = {}
    for record in records:
        if _is_of(record, ("auto",)):
            by_key.setdefault(key_of(record), []).append(record)
    entries = []
    for key, of_key in by_key.items():
        measured = [r for r in of_key if r["correct"] and r["median_us"] is not None]
        if len(of_key) < tried or not measured:
            continue
        limit = _SLACK * min(record["median_us"] for record in measured)
        good = [record for record in measured if record["median_us"] <= limit]
        best = min(good, key=lambda record: record["num_sms"])
        entries.append(
            {
                **dataclasses.asdict(key),
                "num_sms": best["num_sms"],
                "median_us": best["median_us"],
                "versions": best["versions"],
            }
        )
    return entries


def best_crossovers(records: list[dict[str, Any]], tried: int = 1) -> list[dict[str, Any]]:
    """A crossover of the cache for each key, from the records of both modes.

    Args:
        records: Records of the benchmarks.
        tried: Records that a key must have, right or wrong, to get a crossover.
    """
    by_key: dict[tuning.CrossoverKey, list[dict[str, Any]]] = {}
    for record in records:
        if _is_of(record, ("latency", "throughput")):
            key = tuning.crossover_key_of(dataclasses.asdict(key_of(record)))
            by_key.setdefault(key, []).append(record)
    found = []
    for key, of_key in by_key.items():
        wrong = [r["tokens"] for r in of_key if r["mode"] == "latency" and not r["correct"]]
        times: dict[int, dict[str, float]] = {}
        for record in of_key:
            is_timed = record["correct"] and record["median_us"] is not None
            if is_timed and record["tokens"] < min(wrong, default=math.inf):
                times.setdefault(record["tokens"], {})[record["mode"]] = record["median_us"]
        both = {tokens: times[tokens] for tokens in sorted(times) if len(times[tokens]) == 2}
        if len(of_key) < tried or not both:
            continue
        found.append(
            {
                **dataclasses.asdict(key),
                "most_tokens": crossover_of(both),
                "median_us": {str(tokens): us for tokens, us in both.items()},
                "versions": of_key[0]["versions"],
            }
        )
    return found


def crossover_of(times: Mapping[int, Mapping[str, float]]) -> int:
    """The number of tokens up to which latency mode pays; 0 where it never does.

    It is the number for which the product of the times that "auto" takes is least. So one figure that
    noise has changed does not end latency mode below numbers of tokens for which it is clearly faster.

    Args:
        times: Microseconds of "latency" and "throughput" by tokens, in ascending order.
    """
    best, least, total = 0, 0.0, 0.0
    for tokens, us in times.items():
        total += math.log(us["latency"] / us["throughput"])
        if total < least:
            best, least = tokens, total
    return best


def _is_of(record: Mapping[str, Any], modes: tuple[str, ...]) -> bool:
    """Whether it is a record of jax_ep's kernels alone, in one of these modes."""
    is_op = record["op"] in ("dispatch", "combine") and "name" not in record
    return is_op and record["mode"] in modes


def key_of(record: dict[str, Any]) -> tuning.Key:
    """The key of the cache that a record's figure is for."""
    cast = "f32" if record["quantization"] in ("fp8", "fp8-dense") else None
    return tuning.Key(
        device_kind=record["device"],
        ranks=record["ranks"],
        op=record["op"],
        layout=record["layout"],
        rows=tuning.rows_name(record["dtype"], cast, record["quantization"] == "fp8-dense"),
        hidden=record["hidden"],
        tokens=tuning.tokens_bucket(record["tokens"]),
    )


def merged(kept: tuning.Contents, found: tuning.Contents) -> tuning.Contents:
    """The entries found, and those kept that none of them replaces."""
    keys = (tuning.key_of, tuning.crossover_key_of)
    lists = []
    for key, before, new in zip(keys, kept, found, strict=True):
        replaced = {key(entry) for entry in new}
        lists.append([entry for entry in before if key(entry) not in replaced] + new)
    return tuning.Contents(*lists)


def entries_to_keep(path: pathlib.Path, console: rich.console.Console) -> tuning.Contents:
    """The entries that the cache has; none, with a message, if it cannot be used."""
    if not path.exists():
        return tuning.Contents([], [])
    try:
        return tuning.contents_of(path.read_text())
    except (OSError, ValueError) as error:
        console.print(f"{path} is replaced: {error}", highlight=False)
        return tuning.Contents([], [])


if __name__ == "__main__":
    typer.run(main)
