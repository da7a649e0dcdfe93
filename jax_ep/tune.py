"""``python -m jax_ep.tune``: finds the best numbers of SMs for dispatch and combine here.

It times each op with several numbers of SMs on the GPUs here, as the benchmarks do, and writes the
best into the tuning cache, which groups read when they are created (``jax_ep._groups.tuning``). Of
the numbers within two percent of the best it takes the smallest, because computation can use the
other SMs.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import shlex
import sys
from collections.abc import Iterable
from typing import Annotated, Any

try:
    import rich.console
    import rich.table
    import typer
except ImportError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f"jax_ep.tune: {package} is not installed: pip install 'jax-ep[bench]'")

from jax_ep._groups import tuning
from jax_ep.bench import launch
from jax_ep.bench.__main__ import listed, measure
from jax_ep.bench.cases import Case
from jax_ep.bench.machine import check_processes, count_gpus

_CANDIDATES = "8,12,16,20,24,28,32,40,48,64,80,100"
_QUANTIZATIONS = "none,quantized,fp8"
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
    ranks: Annotated[int | None, typer.Option(help="All GPUs.")] = None,
    processes: Annotated[int, typer.Option(help="1, or one for each rank.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 50,
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = 300.0,
    cache: Annotated[
        pathlib.Path | None, typer.Option(help=f"Instead of ${tuning.CACHE_VARIABLE}.")
    ] = None,
) -> None:
    """Find good numbers of SMs and write them to the tuning cache. Options may be lists."""
    gpus = count_gpus()
    if gpus == 0:
        sys.exit("jax_ep.tune: there is no GPU here; on CPU the number of SMs has no meaning")
    count = ranks or max(gpus, processes)
    try:
        cases = cases_of(
            Case(top_k=top_k, experts=experts),
            tokens=[int(value) for value in listed("--tokens", tokens)],
            hidden=[int(value) for value in listed("--hidden", hidden)],
            layouts=listed("--layout", layout, ("expert", "token")),
            dtypes=listed("--dtype", dtype, ("bfloat16", "float16", "float32")),
            quantizations=listed("--quantization", quantization),
            candidates=[int(value) for value in listed("--num-sms", num_sms)],
        )
        check_processes(count, processes, gpus)
        cases[0].check_ranks(count)
    except (ValueError, IndexError) as error:
        raise typer.BadParameter(str(error)) from error
    console = rich.console.Console()
    path = tuning.cache_path() if cache is None else cache
    kept = entries_to_keep(path, console)
    job = launch.Job(
        cases=cases,
        ranks=count,
        processes=processes,
        gpus=gpus,
        repeat=repeat,
        command="python -m jax_ep.tune " + shlex.join(sys.argv[1:]),
    )

    def save(records: list[dict[str, Any]]) -> None:
        """Save what is known by now, so that a run that is ended early keeps its results."""
        if found := best_entries(records, tried=len({case.num_sms for case in cases})):
            tuning.save(path, merged(kept, found))

    found = best_entries(measure(job, timeout=timeout, console=console, save=save))
    if not found:
        sys.exit("jax_ep.tune: no op gave a right result in time; see python -m jax_ep.bench")
    tuning.save(path, merged(kept, found))
    table = rich.table.Table(title=f"written to {path}")
    for column in ("op", "layout", "rows", "tokens", "hidden", "SMs", "us"):
        table.add_column(column)
    for entry in found:
        table.add_row(
            *(str(entry[field]) for field in ("op", "layout", "rows", "tokens", "hidden")),
            str(entry["num_sms"]),
            f"{entry['median_us']:.1f}",
        )
    console.print(table)


def cases_of(
    base: Case,
    *,
    tokens: list[int],
    hidden: list[int],
    layouts: list[str],
    dtypes: list[str],
    quantizations: list[str],
    candidates: list[int],
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


def best_entries(records: list[dict[str, Any]], tried: int = 1) -> list[dict[str, Any]]:
    """An entry of the cache for each key, from the right records of jax_ep's kernels alone.

    Args:
        records: Records of the benchmarks.
        tried: Records that a key must have, right or wrong, to get an entry.
    """
    by_key: dict[tuning.Key, list[dict[str, Any]]] = {}
    for record in records:
        if record["op"] in ("dispatch", "combine") and "name" not in record:
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


def merged(kept: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries found, and those kept that none of them replaces."""
    replaced = {tuning.key_of(entry) for entry in found}
    return [entry for entry in kept if tuning.key_of(entry) not in replaced] + found


def entries_to_keep(path: pathlib.Path, console: rich.console.Console) -> list[dict[str, Any]]:
    """The entries that the cache has; none, with a message, if it cannot be used."""
    if not path.exists():
        return []
    try:
        return tuning.entries_of(path.read_text())
    except (OSError, ValueError) as error:
        console.print(f"{path} is replaced: {error}", highlight=False)
        return []


if __name__ == "__main__":
    typer.run(main)
