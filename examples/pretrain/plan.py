"""What a training step needs on H200s, before you rent them.

    python -m examples.pretrain.plan --config 671b --hosts 32
    python -m examples.pretrain.plan --config 16b --hosts 1,2,4 --set data.seq_len=8192 --json plan.json

compiles the step of a configuration for that many H200s, without a GPU, and prints the memory of a GPU
as XLA's analysis has it, and a time that is predicted, not measured (``costs.py``). It takes XLA's
compiler for GPUs; without it, the error says what to install.
"""

from __future__ import annotations

import dataclasses
import json as json_text
import os
import pathlib
import sys
import time
from typing import Annotated, Any

import rich.console
import rich.table
import typer

from examples.pretrain import config as configs
from examples.pretrain import h200

GPU_GB = 141.0  # of an H200
# A group holds 45 MiB of each GPU, and as much for each of its channels, of which there is one.
WORKSPACE_BYTES = 2 * 47_228_928
NETWORK_BYTES = 2 << 30  # JAX_EP_NETWORK_BYTES, for groups that span hosts
NOTE = "memory from XLA's analysis of the compiled step; times predicted, not measured"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one GPU during a step.

    Attributes:
        arguments: State and batch.
        temporaries: Gradients, activations and gathered weights, at the worst moment.
        outputs: Results that take no argument's place.
        workspaces: Of jax_ep's group.
    """

    arguments: int
    temporaries: int
    outputs: int
    workspaces: int

    @property
    def total(self) -> int:
        """Their sum. CUDA, NCCL and fragments take some GB besides."""
        return self.arguments + self.temporaries + self.outputs + self.workspaces


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on one number of hosts.

    Attributes:
        config: Name of the configuration.
        hosts: Hosts.
        per_host: GPUs of each.
        mesh: Sizes of the mesh's axes.
        sequences: Of one rank in a step.
        accumulate: Micro-batches of a step.
        seq_len: Tokens of a sequence.
        num_weights: Of experts and of all other matrices.
        memory: Of one GPU.
        time: A ``costs.Estimate``.
        compile_s: Seconds of tracing and compiling here.
    """

    config: str
    hosts: int
    per_host: int
    mesh: dict[str, int]
    sequences: int
    accumulate: int
    seq_len: int
    num_weights: dict[str, int]
    memory: Memory
    time: Any
    compile_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        found["memory"]["total"] = self.memory.total
        return found | {"note": NOTE}


def compile_step(config: configs.Config, hosts: int, per_host: int) -> tuple[Any, Any]:
    """The setup on so many H200s, and its train step, compiled.

    ``h200.prepare`` must have run before JAX was imported.

    Raises:
        ConfigError: if the configuration does not fit so many GPUs.
        NoCompilerError: if the group cannot be made as it would be there.
    """
    from examples.pretrain import step

    setup = step.setup(config, h200.devices(hosts, per_host))
    if setup.group.backend != "cuda":
        raise h200.NoCompilerError(
            f"the group would run on {setup.group.backend!r}, since a native library of jax_ep is "
            "missing here; the log says which. Groups that span hosts need NVSHMEM's library to be "
            "planned: pip install nvidia-nvshmem-cu13."
        )
    traced = setup.train_step.trace(setup.abstract_state(), setup.abstract_batch())
    return setup, traced.lower(lowering_platforms=("cuda",)).compile()


def make(config: configs.Config, hosts: int, per_host: int = 8) -> Plan:
    """Compile the step for ``hosts`` hosts, and say what it needs; see ``compile_step``."""
    start = time.monotonic()
    setup, compiled = compile_step(config, hosts, per_host)
    return describe(setup, compiled, per_host, compile_s=time.monotonic() - start)


def describe(setup: Any, compiled: Any, per_host: int, *, compile_s: float) -> Plan:
    """What a compiled step needs."""
    import jax

    from examples.pretrain import costs

    config, analysis = setup.config, compiled.memory_analysis()
    hosts = setup.mesh.size // per_host
    mesh = dict(setup.mesh.shape)
    spans_hosts = costs.Place.of(mesh["expert"], mesh["tensor"], per_host).hosts > 1
    num_weights = {"experts": 0, "others": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.abstract_state().params):
        of_expert = "experts" in str(path) and path[-1].key in ("gate", "up", "down")
        num_weights["experts" if of_expert else "others"] += leaf.size
    return Plan(
        config=config.name,
        hosts=hosts,
        per_host=per_host,
        mesh=mesh,
        sequences=config.data.batch_size // (hosts * per_host // mesh["tensor"]),
        accumulate=config.data.accumulate,
        seq_len=config.data.seq_len,
        num_weights=num_weights,
        memory=Memory(
            arguments=analysis.argument_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
            outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            workspaces=WORKSPACE_BYTES
            + spans_hosts * int(os.environ.get("JAX_EP_NETWORK_BYTES") or NETWORK_BYTES),
        ),
        time=costs.estimate(config, mesh, num_weights, per_host=per_host),
        compile_s=compile_s,
    )


def table(plans: list[Plan]) -> rich.table.Table:
    """A row for each number of hosts."""
    first = plans[0]
    weights = sum(first.num_weights.values()) / 1e9
    out = rich.table.Table(
        title=f"{first.config}: {weights:.1f} billion weights, sequences of {first.seq_len}; {NOTE}",
        caption="Per GPU. best ms: all rows behind computation. CUDA and NCCL take some GB besides.",
    )
    columns = ["hosts", "GPUs", "mesh", "sequences", "state GB", "temporary GB", "workspace GB"]
    columns += ["total GB", "step ms", "best ms", "tokens/s", "MFU", "bound by"]
    for column in columns:
        out.add_column(column, justify="left" if column in ("mesh", "bound by") else "right")
    for plan in plans:
        memory, found = plan.memory, plan.time
        mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
        gigabytes = (memory.arguments, memory.temporaries + memory.outputs, memory.workspaces)
        out.add_row(
            str(plan.hosts),
            str(plan.hosts * plan.per_host),
            mesh or "one GPU",
            str(plan.sequences),
            *(f"{size / 1e9:.1f}" for size in gigabytes),
            f"{memory.total / 1e9:.1f}" + ("" if memory.total < GPU_GB * 1e9 else " (too much)"),
            f"{1e3 * found.step_s:.0f}",
            f"{1e3 * found.best_s:.0f}",
            f"{found.tokens_per_s:,.0f}",
            f"{found.mfu:.0%}",
            found.bound,
        )
    return out


def parts_table(plan: Plan) -> rich.table.Table:
    """What the time of a step is made of."""
    out = rich.table.Table(title=f"A step on {plan.hosts} hosts")
    out.add_column("part")
    out.add_column("ms", justify="right")
    for part in sorted(plan.time.parts, key=lambda part: -part.seconds):
        out.add_row(part.name, f"{1e3 * part.seconds:.0f}")
    return out


def with_sequences(config: configs.Config, gpus: int, sequences: int | None) -> configs.Config:
    """``config`` with so many sequences of each rank in a step; None for those of its batch, or 1.

    GPUs along "tensor" have the same sequences, so they count as one rank.
    """
    data, ranks = config.data, max(1, gpus // max(1, config.parallel.tensor))
    if sequences is None:
        sequences = max(1, data.batch_size // (data.accumulate * ranks)) * data.accumulate
    data = dataclasses.replace(data, batch_size=sequences * ranks)
    return dataclasses.replace(config, data=data)


def main(
    config: Annotated[str, typer.Option(help="A name in configs/, or a path.")] = "671b",
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, such as 8,16,32.")] = "1",
    per_host: Annotated[int, typer.Option(help="GPUs of each.")] = 8,
    sequences: Annotated[
        int | None, typer.Option(help="Of each rank in a step; default: as the batch gives.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    json: Annotated[pathlib.Path | None, typer.Option(help="Write the plans there.")] = None,
) -> None:
    """Plan training on H200s. No GPU is used."""
    plans = []
    try:
        counts = [int(part) for part in hosts.split(",")]
        h200.prepare()
        loaded = configs.load(config, overrides or [])
        for count in counts:
            gpus = count * per_host
            print(f"compiling for {gpus} H200s ...", file=sys.stderr, flush=True)
            plans.append(make(with_sequences(loaded, gpus, sequences), count, per_host))
    except (ValueError, h200.NoCompilerError) as error:
        sys.exit(f"plan: {error}")
    console = rich.console.Console()
    if not console.is_terminal:  # a log has no margin
        console = rich.console.Console(width=200)
    console.print(table(plans))
    console.print(parts_table(plans[-1]))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_text.dumps([plan.as_dict() for plan in plans], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
