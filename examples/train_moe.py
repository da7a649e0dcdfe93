"""Train a small byte-level mixture-of-experts language model with expert parallelism.

On eight CPU devices, two data-parallel groups of four expert-parallel ranks, for five minutes, on the
Python sources of the interpreter that runs it::

    python examples/train_moe.py
    python examples/train_moe.py --data my_texts/ --minutes 30 --balance bias --out runs/mine
    python examples/train_moe.py --resume

In two processes of four devices each (on one machine or on two that share the folder ``--out``)::

    python examples/train_moe.py --devices 4 --coordinator 127.0.0.1:9911 --num-processes 2 \
        --process-id 0 &
    python examples/train_moe.py --devices 4 --coordinator 127.0.0.1:9911 --num-processes 2 \
        --process-id 1

Where there are GPUs it runs on those, all of them or the first ``--devices``; of several processes on
one machine, each must see its own alone (``CUDA_VISIBLE_DEVICES``).

The parts are in ``examples/byte_lm``: the model with its ``jax_ep.nnx.MoE`` layers in model.py, the
training step in training.py, batches in data.py, checkpoints in checkpoint.py.
"""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from byte_lm import cluster, data
from byte_lm.config import Balance, ModelConfig, Precision, RunConfig, TrainConfig

# jax starts on the devices that the command line asks for, so it is imported only after that.


def main(
    data_path: Annotated[
        pathlib.Path | None,
        typer.Option("--data", help="File or folder of text; default: Python's own library."),
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of all results.")] = RunConfig.out,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Of training.")] = RunConfig.minutes,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of minutes.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = RunConfig.checkpoint_every,
    prompt: Annotated[str, typer.Option(help="Of the text sample.")] = RunConfig.prompt,
    devices: Annotated[int | None, typer.Option(min=1, help="Of this process; 8 on CPU.")] = None,
    data_parallel: Annotated[int | None, typer.Option(min=1, help='Size of axis "data".')] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0.")] = None,
    num_processes: Annotated[int, typer.Option(min=1)] = 1,
    process_id: Annotated[int, typer.Option(min=0)] = 0,
    num_layers: Annotated[int, typer.Option(min=1)] = ModelConfig.num_layers,
    hidden: Annotated[int, typer.Option(min=4)] = ModelConfig.hidden,
    num_heads: Annotated[int, typer.Option(min=1)] = ModelConfig.num_heads,
    num_experts: Annotated[int, typer.Option(min=1)] = ModelConfig.num_experts,
    top_k: Annotated[int, typer.Option(min=1)] = ModelConfig.top_k,
    expert_hidden: Annotated[int, typer.Option(min=1)] = ModelConfig.expert_hidden,
    balance: Annotated[Balance, typer.Option(help="Of the experts' load.")] = ModelConfig.balance,
    capacity_factor: Annotated[
        float, typer.Option(min=0, help="Of each expert while training; 0: no bound.")
    ] = ModelConfig.capacity_factor or 0.0,
    dtype: Annotated[Precision, typer.Option(help="Of the computation.")] = ModelConfig.dtype,
    seed: Annotated[int, typer.Option(min=0)] = TrainConfig.seed,
    batch_size: Annotated[int, typer.Option(min=1)] = TrainConfig.batch_size,
    seq_len: Annotated[int, typer.Option(min=2)] = TrainConfig.seq_len,
    learning_rate: Annotated[float, typer.Option(min=0)] = TrainConfig.learning_rate,
    warmup_steps: Annotated[int, typer.Option(min=0)] = TrainConfig.warmup_steps,
) -> None:
    """Train a byte-level mixture-of-experts language model with expert parallelism."""
    processes = None
    if coordinator is not None:
        processes = cluster.Processes(coordinator, num_processes, process_id)
    cluster.start(devices=devices, processes=processes)

    from byte_lm.run import Run
    from byte_lm.training import Trainer

    model_config = ModelConfig(
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_experts=num_experts,
        top_k=top_k,
        expert_hidden=expert_hidden,
        balance=balance,
        capacity_factor=capacity_factor or None,
        dtype=dtype,
    )
    train_config = TrainConfig(
        seed=seed,
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
    )
    run_config = RunConfig(
        out=out,
        steps=steps,
        minutes=minutes,
        checkpoint_every=checkpoint_every,
        resume=resume,
        prompt=prompt,
    )
    try:
        mesh = cluster.make_mesh(devices=devices, data_parallel=data_parallel)
        corpus = data.load(data_path, min_bytes=seq_len + 1)
        run = Run(Trainer(mesh, model_config, train_config), corpus, run_config)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    with run:
        run.train()
        run.finish()


if __name__ == "__main__":
    typer.run(main)
