"""Options of the command line that the programs here share: devices and processes."""

from __future__ import annotations

from typing import Annotated

import typer

Devices = Annotated[
    int | None,
    typer.Option(min=1, help="Of this process.", show_default="8 on CPU, or all GPUs"),
]
DataParallel = Annotated[
    int | None,
    typer.Option(
        min=1, help='Size of the mesh axis "data".', show_default="2 of 4 devices or more"
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(help="host:port of process 0, where several processes work together."),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that work together.", show_default="1"),
]
ProcessId = Annotated[
    int | None,
    typer.Option(min=0, help="Number of this process, from 0.", show_default="0"),
]
