"""``python -m jax_ep.scale``: what dispatch and combine would take on 1 to 256 hosts.

Figures are predictions of a model (``jax_ep.scale``), which docs/scale.md compares with measurements.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from typing import Annotated, get_args

try:
    import rich.console
    import rich.table
    import typer
except ImportError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f"jax_ep.scale: {package} is not installed: pip install 'jax-ep[bench]'")

from jax_ep._core.types import Layout
from jax_ep.scale import show
from jax_ep.scale.machine import H200
from jax_ep.scale.model import Prediction, predict
from jax_ep.scale.workload import Dtype, Quantization, Workload

MOST_HOSTS = 256
_ALL_ROWS = "any"


def main(
    hosts: Annotated[
        str | None, typer.Option(help="A list; by default powers of two that the experts allow.")
    ] = None,
    ranks_per_host: Annotated[int, typer.Option(help="GPUs, each with a NIC.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of each rank.")] = Workload.tokens,
    hidden: Annotated[int, typer.Option()] = Workload.hidden,
    top_k: Annotated[int, typer.Option()] = Workload.top_k,
    experts: Annotated[int, typer.Option(help="Over all ranks.")] = Workload.experts,
    groups: Annotated[int, typer.Option(help="Groups of experts.")] = Workload.num_groups,
    top_groups: Annotated[
        int, typer.Option(help="Groups that a token's experts may be in.")
    ] = Workload.top_groups,
    layout: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Layout))}.")] = "token",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Dtype))}.")] = "bfloat16",
    quantization: Annotated[
        str, typer.Option(help=f"Of dispatch: {', '.join(get_args(Quantization))}.")
    ] = "none",
    alignment: Annotated[int, typer.Option(help="Of experts' rows.")] = Workload.alignment,
    capacity: Annotated[
        str, typer.Option(help=f"Room, times the rows expected, or {_ALL_ROWS!r}: for any routing.")
    ] = "1",
    num_sms: Annotated[int | None, typer.Option(help="SMs an op may occupy.")] = None,
    nvlink: Annotated[float, typer.Option(help="GB/s in one direction.")] = H200.nvlink_gbs,
    nic: Annotated[float, typer.Option(help="GB/s of a GPU in one direction.")] = H200.nic_gbs,
    memory: Annotated[float, typer.Option(help="GB/s read and written.")] = H200.memory_gbs,
    latency: Annotated[float, typer.Option(help="Us to another host.")] = H200.network_us,
    json: Annotated[pathlib.Path | None, typer.Option(help="Write predictions there.")] = None,
    plot_path: Annotated[pathlib.Path | None, typer.Option("--plot", help="Draw them there.")] = (
        None
    ),
) -> None:
    """Predict what dispatch and combine take across hosts. No GPU is used."""
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("jax_ep.scale: matplotlib is not installed: pip install 'jax-ep[bench]'")
    try:
        machine = dataclasses.replace(
            H200, nvlink_gbs=nvlink, nic_gbs=nic, memory_gbs=memory, network_us=latency
        )
        if machine != H200:
            machine = dataclasses.replace(machine, name="H200 with other rates")
        workload = Workload(
            tokens=tokens,
            hidden=hidden,
            top_k=top_k,
            experts=experts,
            num_groups=groups,
            top_groups=top_groups,
            layout=layout,
            dtype=dtype,
            quantization=quantization,
            alignment=alignment,
            capacity=_capacity(capacity),
            num_sms=num_sms,
        )
        found = [
            predict(workload, hosts=count, ranks_per_host=ranks_per_host, machine=machine)
            for count in _hosts(hosts, experts, ranks_per_host)
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = rich.console.Console()
    if not console.is_terminal:  # a log has no margin
        console = rich.console.Console(width=220)
    console.print(table(found))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(show.as_json(found))
    if plot_path is not None:
        show.plot(found, plot_path)


def table(found: list[Prediction]) -> rich.table.Table:
    """A row for each number of hosts."""
    workload = found[0].workload
    limit = f", {workload.top_groups} of {workload.num_groups} groups"
    out = rich.table.Table(
        title=(
            f"{found[0].machine.name}; T={workload.tokens} H={workload.hidden} K={workload.top_k} "
            f"E={workload.experts}{limit if workload.num_groups > 1 else ''}, {workload.layout}, "
            f"{workload.dtype}, quantization {workload.quantization}: {show.NOTE}"
        ),
        caption=show.CAPTION,
    )
    for column in show.COLUMNS:
        out.add_column(column, justify="left" if column == "bound by" else "right")
    for prediction in found:
        out.add_row(*show.row(prediction))
    return out


def _hosts(text: str | None, experts: int, ranks_per_host: int) -> list[int]:
    if ranks_per_host < 1:
        raise ValueError(f"--ranks-per-host: expected 1 or more, got {ranks_per_host}.")
    if text is None:
        powers = [2**power for power in range(MOST_HOSTS.bit_length())]
        allowed = [count for count in powers if experts % (count * ranks_per_host) == 0]
        if not allowed:
            raise ValueError(
                f"--experts: expected a multiple of the {ranks_per_host} ranks of a host, got "
                f"{experts}."
            )
        return allowed
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--hosts: expected integers, got {text!r}.") from None
    if not all(1 <= count <= MOST_HOSTS for count in counts):
        raise ValueError(f"--hosts: expected 1 to {MOST_HOSTS}, got {text!r}.")
    return counts


def _capacity(text: str) -> float | None:
    if text == _ALL_ROWS:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--capacity: expected a number or {_ALL_ROWS!r}, got {text!r}.") from None


if __name__ == "__main__":
    typer.run(main)
