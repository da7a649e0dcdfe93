"""Generate text with the model of train_moe.py: a small number of tokens a step, as in serving.

It takes the newest checkpoint of ``train_moe.py``. Where there is none, it trains a new model for some
steps, which is enough to see it run but not to read what it writes::

    python examples/decode_moe.py
    python examples/train_moe.py --minutes 30 && python examples/decode_moe.py --batch-size 512

All texts grow by one byte a step. The whole generation is one jitted program, a scan over steps with a
cache of keys and values, so the host does nothing between steps, and GPUs can replay them as CUDA
graphs. A rank has few tokens in a step, and the group is made with room for latency mode, so the MoE
layers take that by themselves (``DispatchConfig(mode="auto")``).

At the end it prints tokens (bytes) per second, and the share of communication: the time that the
dispatches and combines of a step take in a program that has nothing else, over the time of a step.
Tokens have the same shapes there, but random routes. Both are medians of several runs without
compiling. Waiting for a rank whose experts got more rows counts as computation.

Devices and processes are chosen as in ``train_moe.py``; ranks that span hosts take ``--no-latency``.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from jaxtyping import Int32

from byte_lm import cluster, data, options
from byte_lm.config import ModelConfig, RunConfig, TrainConfig
from common.processes import given_processes, start_jax

# jax starts on the devices that the command line asks for, so it is imported after parsing it.
if TYPE_CHECKING:
    import jax

    from byte_lm.training import Trainer, TrainState


def main(
    run: Annotated[
        pathlib.Path, typer.Option(help="Folder of the results of train_moe.py.")
    ] = RunConfig.out,
    steps: Annotated[int, typer.Option(min=0, help="To train where there is no checkpoint.")] = 10,
    data_path: Annotated[
        pathlib.Path | None,
        typer.Option("--data", help="File or folder of text; default: Python's own library."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts, over all devices.")] = 64,
    prompt: Annotated[
        str | None,
        typer.Option(help="Beginning of all texts.", show_default="pieces of held-out text"),
    ] = None,
    prompt_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of held-out text that a text begins with.")
    ] = 32,
    new_bytes: Annotated[int, typer.Option(min=1, help="Bytes to append to each text.")] = 48,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="Of the second set of texts; the first is greedy.")
    ] = 0.8,
    show: Annotated[int, typer.Option(min=0, help="Texts of each set to print.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Runs that are timed.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
    latency: Annotated[
        bool, typer.Option(help="Make room for latency mode, which ranks of one host have.")
    ] = True,
    devices: options.Devices = None,
    data_parallel: options.DataParallel = None,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
) -> None:
    """Generate text with the model that train_moe.py trained."""
    try:
        given = None if prompt is None else prompt.encode()
        if given == b"":
            raise ValueError("--prompt: expected one byte or more, got none; leave it out instead.")
        processes = given_processes(coordinator, count=num_processes, index=process_id)
        start_jax(devices=devices, processes=processes)

        from byte_lm.decoding import Decoder

        mesh = cluster.make_mesh(devices=devices, data_parallel=data_parallel)
        length = prompt_bytes if given is None else len(given)
        corpus = data.load(data_path, min_bytes=max(length, TrainConfig.seq_len) + 1)
        trainer, state, origin = load_or_train(mesh, run, corpus, steps=steps)
        decoder = Decoder(
            mesh,
            trainer.model_config,
            batch_size=batch_size,
            prompt_bytes=length,
            new_bytes=new_bytes,
            latency=latency,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"decode_moe.py: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error

    import jax
    from rich.console import Console

    console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
    console.print(f"model: {origin}; mesh: {dict(mesh.shape)}; {batch_size} texts", markup=False)
    prompts = prompts_of(corpus, given, batch_size=batch_size, length=length)
    begun = decoder.begin(state, decoder.put(prompts))
    for name, heat in (("greedy", 0.0), (f"temperature {temperature:g}", temperature)):
        made = decoder.texts(state, begun, seed=seed, temperature=heat)
        for number, text in enumerate(np.concatenate([prompts, made], axis=1)[:show]):
            console.rule(f"{name}, text {number}")
            console.print(text.astype(np.uint8).tobytes().decode(errors="replace"), markup=False)
    console.rule()
    step = decoder.seconds_of_decode(state, begun, repeat=repeat)
    ops = decoder.seconds_of_exchange(seed=seed, repeat=repeat)
    calls = ", ".join(decoder.calls(state, begun)) or "none, as this is the reference backend"
    console.print(
        f"{batch_size / step:.0f} tokens/s: a step of {batch_size} tokens, "
        f"{batch_size // mesh.size} on each device, takes {1e6 * step:.0f} us\n"
        f"communication: {100 * ops / step:.0f} % of it, as the dispatches and combines of a step take "
        f"{1e6 * ops:.0f} us alone, on random routes\n"
        f"(medians of {repeat} runs of {new_bytes} steps)\n"
        f"calls of jax_ep: {calls}",
        markup=False,
    )


def load_or_train(
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
    corpus: data.Corpus,
    *,
    steps: int,
    model_config: ModelConfig | None = None,
    train_config: TrainConfig | None = None,
) -> tuple[Trainer, TrainState, str]:
    """A model from the newest checkpoint of a run, or a new one that is trained for some steps.

    Args:
        mesh: With axes "data" and "expert".
        folder: Of the run. Nothing is written there.
        corpus: The text to train on.
        steps: Of training, where there is no checkpoint.
        model_config: Of a new model; None takes the defaults of ``train_moe.py`` with two blocks, which
            compile sooner.
        train_config: The same for its training.

    Returns:
        The trainer, its state without that of the optimizer, and its origin as a text to print.
    """
    from byte_lm.training import Trainer
    from common.checkpoints import Checkpoints, newest

    found = newest(folder / "checkpoints")
    if found is not None:
        checkpoints = Checkpoints(folder / "checkpoints")
        saved = checkpoints.settings(found)
        # Batches of training have to split over the devices here, too, although there are none.
        train = dataclasses.replace(TrainConfig(**saved["train"]), batch_size=mesh.size)
        trainer = Trainer(mesh, ModelConfig(**saved["model"]), train)
        state = checkpoints.restore(found, trainer.abstract_state)
        checkpoints.close()
        origin = f"step {found} of {folder}"
    else:
        small = ModelConfig(num_layers=2)
        trainer = Trainer(mesh, model_config or small, train_config or TrainConfig())
        state = trainer.initial_state()
        for step in range(1, steps + 1):
            state, _ = trainer.step_on(state, corpus, step=step, total_steps=steps)
        trainer.check()
        origin = f"trained for {steps} steps only, as there is no checkpoint in {folder}"
    return trainer, state._replace(opt_state=()), origin


def prompts_of(
    corpus: data.Corpus, prompt: bytes | None, *, batch_size: int, length: int
) -> Int32[np.ndarray, "batch length"]:
    """The beginnings of all texts: ``prompt``, or different pieces of held-out text."""
    if prompt is not None:
        return np.tile(np.frombuffer(prompt, np.uint8).astype(np.int32), (batch_size, 1))
    (windows,) = corpus.held_out_batches(num_batches=1, batch_size=batch_size, seq_len=length)
    return windows[:, :length]


if __name__ == "__main__":
    typer.run(main)
