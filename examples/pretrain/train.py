"""Train a decoder like DeepSeek-V3: ``python -m examples.pretrain.train --config tiny``.

Without ``--data`` it trains on Python's own library, which it packs first, so that this is all that a
first try needs. README.md says how to bring your own text and how to start on clusters.

Ctrl-C and SIGTERM save a checkpoint; the same command with ``--resume`` goes on from it, on any number
of processes and devices. Exit status: 0 at the end of the run, 128 + the signal's number after a signal
(143 for SIGTERM), 2 for wrong options, 1 if the run failed.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from examples.common.processes import start_jax
from examples.pretrain import config as configs
from examples.pretrain.cluster import find_processes

# jax starts on the devices that the command line asks for, so it is imported after parsing it.
if TYPE_CHECKING:
    from examples.pretrain.loop import Loop, Options


def main(
    config: Annotated[str, typer.Option(help="A name in configs/, or a TOML file.")] = "tiny",
    changes: Annotated[
        list[str],
        typer.Option("--set", help="A value to change: section.key=value. May be repeated."),
    ] = [],  # noqa: B006  (typer reads it and changes nothing)
    data: Annotated[
        list[str],
        typer.Option(
            help="Folder of packed rows, or FOLDER=WEIGHT. May be repeated, for a mixture.",
            show_default="Python's library, packed into --out",
        ),
    ] = [],  # noqa: B006
    out: Annotated[pathlib.Path, typer.Option(help="Folder of all results.")] = pathlib.Path(
        "runs/pretrain"
    ),
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option(help="With --resume: accept other settings than before.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="End after this time of training, with a checkpoint."),
    ] = None,
    profile_steps: Annotated[
        str | None, typer.Option(help="FIRST:LAST step of a trace, written to OUT/profile.")
    ] = None,
    weights: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of safetensors files to begin with, names as DeepSeek-V3's."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="CPU devices of this process.", show_default="8")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="host:port of process 0.", show_default="from Slurm or the environment"),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="likewise")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, help="Number of this one.", show_default="likewise")
    ] = None,
) -> None:
    """Train a decoder like DeepSeek-V3."""
    started = time.perf_counter()
    try:
        settings = configs.load(config, changes)
        profile = _steps(profile_steps)
        given = [_source(text) for text in data]
        start_jax(
            devices=devices,
            processes=find_processes(coordinator, count=num_processes, index=process_id),
        )
        # These import jax.
        from examples.pretrain.loop import DivergedError, Options
        from jax_ep import CommunicationError

        options = Options(
            out=out,
            resume=resume,
            allow_changes=allow_changes,
            minutes=minutes,
            profile=profile,
            weights=weights,
            command=shlex.join(["python", "-m", "examples.pretrain.train", *sys.argv[1:]]),
            started=started,
        )
        loop = _make_loop(settings, given, options)
    except (ValueError, OSError) as error:
        typer.echo(f"train: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    try:
        with loop:
            if ended_by := loop.train():
                raise typer.Exit(128 + ended_by)  # as in a shell
            loop.finish()
    except (CommunicationError, DivergedError) as error:
        typer.echo(f"train: stopped at step {loop.step}: {error}", err=True)
        raise typer.Exit(1) from error


def _make_loop(
    settings: configs.Config, data: list[tuple[pathlib.Path, float]], options: Options
) -> Loop:
    """Set everything up; nothing is trained yet."""
    from examples.pretrain.data import Rows, Source
    from examples.pretrain.loop import Loop
    from examples.pretrain.prepare import default_rows
    from examples.pretrain.step import setup

    if not data:
        data = [(default_rows(options.out / "rows", settings), 1.0)]
    rows = Rows(
        [Source(*source) for source in data],
        seq_len=settings.data.seq_len,
        vocab_size=settings.model.vocab_size,
    )
    model, most = settings.model, rows.summary.most_segments
    if model.attention == "cudnn" and most > model.most_segments:
        raise ValueError(
            f"--data: expected rows of at most model.most_segments = {model.most_segments} documents, "
            f"got {most}; pack with --most-segments {model.most_segments}, or set "
            f"model.most_segments={most}."
        )
    return Loop(settings, setup(settings), rows, options)


def _source(text: str) -> tuple[pathlib.Path, float]:
    folder, equals, weight = text.rpartition("=")
    if not equals:
        return pathlib.Path(text), 1.0
    if not re.fullmatch(r"\d+(\.\d*)?", weight) or float(weight) == 0:
        raise ValueError(f"--data: expected FOLDER or FOLDER=WEIGHT, as in web=0.7, got {text!r}.")
    return pathlib.Path(folder), float(weight)


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile-steps: expected FIRST:LAST, as in 10:12, got {text!r}.")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    typer.run(main)
