"""Train a small byte-level mixture-of-experts language model with expert parallelism.

By default it trains for five minutes on eight CPU devices, in two data-parallel groups of four
expert-parallel ranks, on the Python sources of its interpreter::

    python examples/train_moe.py
    python examples/train_moe.py --data my_texts/ --minutes 30 --balance bias --out runs/mine
    python examples/train_moe.py --resume

Ctrl-C and SIGTERM save a checkpoint and say so; the same command with ``--resume`` goes on from it.

In two processes of four devices each (on one machine or on two that share the folder ``--out``)::

    python examples/train_moe.py --devices 4 --coordinator 127.0.0.1:9911 --num-processes 2 \
        --process-id 0 &
    python examples/train_moe.py --devices 4 --coordinator 127.0.0.1:9911 --num-processes 2 \
        --process-id 1

Where there are GPUs it runs on these, on all or on the first ``--devices``. If several processes
run on one machine, each must see only its own GPUs (``CUDA_VISIBLE_DEVICES``). ``--ranks-per-host``
makes logical hosts of them, for tests: GPUs of different ones exchange rows over NVSHMEM.

The parts are in ``examples/byte_lm``: the model with its ``jax_ep.nnx.MoE`` layers in model.py, the
training step in training.py, batches in data.py, and one run in run.py. ``examples/common`` has what
knows no model: processes, checkpoints, signals and metrics.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from byte_lm import cluster, data, options
from byte_lm.config import (
    DEFAULT_MINUTES,
    Balance,
    ModelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from common.processes import Processes, given_processes, start_jax

# jax starts on the devices that the command line asks for, so it is imported after parsing it.
if TYPE_CHECKING:
    from byte_lm.run import Run


def main(
    data_path: Annotated[
        pathlib.Path | None,
        typer.Option("--data", help="File or folder of text; default: Python's own library."),
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of all results.")] = RunConfig.out,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of training in all, without compiling and evaluating.",
            show_default=f"{DEFAULT_MINUTES:g}; with --resume, as before",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of training in all, instead of minutes.")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints.", show_default="one minute"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Beginning of the text sample.")] = RunConfig.prompt,
    devices: options.Devices = None,
    data_parallel: options.DataParallel = None,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Expert-parallel ranks that count as one host.",
            show_default="those that share one",
        ),
    ] = None,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    num_layers: Annotated[
        int, typer.Option(min=1, help="Blocks of attention and experts.")
    ] = ModelConfig.num_layers,
    hidden: Annotated[int, typer.Option(min=4, help="Channels of a byte.")] = ModelConfig.hidden,
    num_heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = ModelConfig.num_heads,
    num_experts: Annotated[
        int, typer.Option(min=1, help="Experts of each block.")
    ] = ModelConfig.num_experts,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of each byte.")] = ModelConfig.top_k,
    expert_hidden: Annotated[
        int, typer.Option(min=1, help="Inner channels of an expert.")
    ] = ModelConfig.expert_hidden,
    balance: Annotated[
        Balance,
        typer.Option(help="What keeps the experts evenly loaded: a loss, or biases of the router."),
    ] = ModelConfig.balance,
    capacity_factor: Annotated[
        float,
        typer.Option(
            min=0, help="Room of an expert while training, times its even share; 0: no bound."
        ),
    ] = ModelConfig.capacity_factor or 0.0,
    dtype: Annotated[Precision, typer.Option(help="Of the computation.")] = ModelConfig.dtype,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the weights and of the order of the data.")
    ] = TrainConfig.seed,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows of text in a step, over all devices.")
    ] = TrainConfig.batch_size,
    seq_len: Annotated[int, typer.Option(min=2, help="Bytes in a window.")] = TrainConfig.seq_len,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="Highest learning rate.")
    ] = TrainConfig.learning_rate,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps until the learning rate is at its highest.")
    ] = TrainConfig.warmup_steps,
) -> None:
    """Train a byte-level mixture-of-experts language model with expert parallelism."""
    try:
        run = _make_run(
            RunConfig(
                out=out,
                steps=steps,
                minutes=minutes,
                checkpoint_every=checkpoint_every,
                resume=resume,
                prompt=prompt,
            ),
            ModelConfig(
                num_layers=num_layers,
                hidden=hidden,
                num_heads=num_heads,
                num_experts=num_experts,
                top_k=top_k,
                expert_hidden=expert_hidden,
                balance=balance,
                capacity_factor=capacity_factor or None,
                dtype=dtype,
            ),
            TrainConfig(
                seed=seed,
                batch_size=batch_size,
                seq_len=seq_len,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
            ),
            processes=given_processes(coordinator, count=num_processes, index=process_id),
            devices=devices,
            data_parallel=data_parallel,
            ranks_per_host=ranks_per_host,
            data_path=data_path,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"train_moe.py: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    with run:
        if ended_by := run.train():
            raise typer.Exit(128 + ended_by)  # as in a shell
        run.finish()


def _make_run(
    run_config: RunConfig,
    model_config: ModelConfig,
    train_config: TrainConfig,
    *,
    processes: Processes | None,
    devices: int | None,
    data_parallel: int | None,
    ranks_per_host: int | None,
    data_path: pathlib.Path | None,
) -> Run:
    """Start JAX and set everything up; nothing is trained yet."""
    start_jax(devices=devices, processes=processes)

    from byte_lm.run import Run
    from byte_lm.training import Trainer

    mesh = cluster.make_mesh(devices=devices, data_parallel=data_parallel)
    corpus = data.load(data_path, min_bytes=train_config.seq_len + 1)
    trainer = Trainer(mesh, model_config, train_config, ranks_per_host=ranks_per_host)
    return Run(trainer, corpus, run_config)


if __name__ == "__main__":
    typer.run(main)
