"""``python -m jax_ep.bench``: times of dispatch, combine and whole layers on this machine.

Without flags it runs the suite "baselines", in sizes that suit the machine. A suite is a named set of
cases; --ops and the flags after it make cases of your own. Figures are device times; every result is
checked in the same run.
"""

from __future__ import annotations

import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, get_args

try:
    import rich.console
    import rich.progress
    import typer
except ImportError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f"jax_ep.bench: {package} is not installed: pip install 'jax-ep[bench]'")

from jax_ep.bench import launch, plot, records, suites
from jax_ep.bench import table as tables
from jax_ep.bench.cases import (
    COMBINE_HALVES,
    OUR_OPS,
    Capacity,
    Case,
    Dtype,
    Op,
    Quantization,
    Routing,
)
from jax_ep.bench.machine import Machine, check_processes, count_gpus, left_out

_CPU_RANKS = 8
_LOG_WIDTH = 160
_SILENCE_S = 15.0  # at a case, before a log says which


def main(
    suite: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(suites.NAMES)}; instead of cases.")
    ] = None,
    ops: Annotated[str | None, typer.Option(help=f"Of {', '.join(get_args(Op))}.")] = None,
    layout: Annotated[str, typer.Option(help="expert, token or both.")] = "expert,token",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Dtype))}.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Quantization))}.")] = (
        "none"
    ),
    routing: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Routing))}.")] = "uniform",
    ragged: Annotated[bool, typer.Option(help="Ranks with fewer and fewer real tokens.")] = False,
    tokens: Annotated[str, typer.Option(help="Of each rank.")] = "4096",
    hidden: Annotated[int, typer.Option()] = Case.hidden,
    top_k: Annotated[int, typer.Option()] = Case.top_k,
    experts: Annotated[int, typer.Option(help="Over all ranks.")] = Case.experts,
    intermediate: Annotated[int, typer.Option(help="Width of an expert (op layer).")] = 256,
    num_sms: Annotated[str | None, typer.Option(help="SMs an op may occupy.")] = None,
    mode: Annotated[str, typer.Option(help="auto, throughput or latency.")] = "auto",
    weights: Annotated[bool, typer.Option(help="Top-k weights travel along.")] = True,
    capacity: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Capacity))}.")] = "exact",
    ranks: Annotated[int | None, typer.Option(help="All GPUs, or 8 on CPU.")] = None,
    processes: Annotated[int, typer.Option(help="1, or one for each rank.")] = 1,
    hosts: Annotated[
        int, typer.Option(min=1, help="Logical hosts that the ranks are split into.")
    ] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 50,
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = 300.0,
    seconds: Annotated[float, typer.Option(help="After them no case is begun.")] = float("inf"),
    json: Annotated[pathlib.Path | None, typer.Option(help="Write records there.")] = None,
    plot_path: Annotated[pathlib.Path | None, typer.Option("--plot", help="Draw them there.")] = (
        None
    ),
) -> None:
    """Measure dispatch, combine and whole layers. Options may be lists: --suite baselines,decode."""
    if plot_path is not None:
        _need("matplotlib")
    if suite is not None and ops is not None:
        raise typer.BadParameter("--suite and --ops: expected one of them.")
    gpus = count_gpus()
    count = ranks or max(gpus if processes == 1 else processes, 1 if gpus else _CPU_RANKS)
    machine = Machine(ranks=count, processes=processes, gpus=gpus)
    try:
        check_processes(count, processes, gpus)
        if count % hosts:
            raise ValueError(f"--hosts: expected a divisor of the {count} ranks, got {hosts}.")
        if ops is None:
            names = listed("--suite", suite or "baselines", suites.NAMES)
            cases = list(dict.fromkeys(case for n in names for case in suites.suite(n, machine)))
        else:
            fields = itertools.product(
                listed("--routing", routing, get_args(Routing)),
                listed("--tokens", tokens),
                listed("--layout", layout, ("expert", "token")),
                listed("--dtype", dtype, get_args(Dtype)),
                listed("--quantization", quantization, get_args(Quantization)),
                [None] if num_sms is None else listed("--num-sms", num_sms),
                listed("--capacity", capacity, get_args(Capacity)),
                listed("--ops", ops, get_args(Op)),
            )
            cases = _cases(
                fields,
                ragged=ragged,
                hidden=hidden,
                top_k=top_k,
                experts=experts,
                mode=mode,
                weights=weights,
                intermediate=intermediate,
            )
        for case in cases:
            case.check_ranks(count)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    cases, reasons = left_out(cases, machine)
    job = launch.Job(
        cases=cases,
        ranks=count,
        processes=processes,
        gpus=gpus,
        repeat=repeat,
        command="python -m jax_ep.bench " + shlex.join(sys.argv[1:]),
        hosts=hosts,
        until=time.time() + seconds,
    )
    console = rich.console.Console()
    if not console.is_terminal:  # a log has no margin
        console = rich.console.Console(width=max(console.width, _LOG_WIDTH))
    console.print(f"{len(cases)} cases: {machine}; starting", highlight=False)
    for why, number in reasons.items():
        console.print(f"left out: {number} case(s): {why}", highlight=False, soft_wrap=True)
    found = measure(job, timeout=timeout, console=console, json=json)
    console.print(tables.table(found))
    for line in (*tables.failures(found), *tables.ratios(found), *tables.bounds(found)):
        console.print(line, highlight=False, soft_wrap=True)
    if plot_path is not None:
        plot.plot(found, plot_path)
    ours = [r for r in found if r["op"] in OUR_OPS and r.get("name") in (None, "reference")]
    done = sum(r["op"] not in ("ceiling", "link") for r in found)
    if done < len(cases):
        console.print(f"{done} of {len(cases)} cases: the time was over", highlight=False)
    if not all(record["correct"] for record in ours):
        console.print("[red]some of jax_ep's own results are wrong or missing")
        raise typer.Exit(1)


def measure(
    job: launch.Job,
    *,
    timeout: float,
    console: rich.console.Console,
    json: pathlib.Path | None = None,
    save: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """All records of a job: a line for each as it comes.

    Args:
        job: The run.
        timeout: Seconds that a case may take.
        console: For lines and progress.
        json: A file that gets all records so far, after each record.
        save: A function that gets all records so far, after each record.
    """
    begin = time.monotonic()
    found: list[dict[str, Any]] = []
    if json is not None:
        records.save(json, found)
    with (
        launch.ended_by_sigterm(),
        rich.progress.Progress(console=console, transient=True) as bar,
    ):
        task = bar.add_task("", total=len(job.cases))
        at, since, told = "", begin, console.is_terminal  # which shows the bar

        def progress(name: str) -> None:
            nonlocal at, since, told
            bar.update(task, description=name)
            now = time.monotonic()
            if name != at:
                at, since, told = name, now, console.is_terminal
            elif not told and now - since > _SILENCE_S:
                told = True
                console.print(f"{now - begin:5.0f} s  still at {name}", highlight=False)

        seen: list[tuple[Any, ...]] = []
        for record in launch.run(job, timeout=timeout, progress=progress):
            bar.advance(task, record["op"] not in ("ceiling", "link"))
            machine = (record["op"], record.get("name"), record["tokens"], record["top_k"])
            # Each process measures the machine anew; the table shows the first figures.
            if record["op"] in ("ceiling", "link"):
                if machine in seen:
                    continue
                seen.append(machine)
            found.append(record)
            if json is not None:
                records.save(json, found)
            save(found)
            line = f"{time.monotonic() - begin:5.0f} s  {tables.line(record)}"
            console.print(line, highlight=False, soft_wrap=True)
    return found


def _cases(fields: Any, **rest: Any) -> list[Case]:
    cases = []
    intermediate = rest.pop("intermediate")
    for routing, tokens, layout, dtype, quantization, num_sms, capacity, op in fields:
        base = Case(
            routing=routing,
            tokens=_integer("--tokens", tokens),
            layout=layout,
            dtype=dtype,
            quantization=quantization,
            num_sms=None if num_sms is None else _integer("--num-sms", num_sms),
            capacity=capacity,
            op="dispatch" if op in ("exchange", "layer") else op,
            **rest,
        )
        new = [base]
        if op == "exchange":
            new = suites.exchanges(base)
        elif op == "layer":
            new = [
                case
                for case in suites.layers(base, intermediate)
                if case.name != "jax_ep" or case.capacity == capacity
            ]
        elif op == "round_trip":
            new = suites.round_trips(base)
        elif op in ("combine", *COMBINE_HALVES) and quantization != "none":
            continue  # rows come home in full precision
        cases += [case for case in new if case not in cases]
    return cases


def listed(flag: str, text: str, choices: tuple[str, ...] | None = None) -> list[str]:
    """The values of an option that may be a list.

    Raises:
        ValueError: for a value that is not among ``choices``.
    """
    values = [value.strip() for value in text.split(",") if value.strip()]
    return [_one_of(flag, value, choices) for value in values] if choices else values


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{flag}: expected one of {', '.join(choices)}, got {value!r}.")
    return value


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag}: expected an integer, got {text!r}.") from None


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        sys.exit(f"jax_ep.bench: {package} is not installed: pip install 'jax-ep[bench]'")


if __name__ == "__main__":
    typer.run(main)
