"""Compiles layers for H200s without a GPU, and prints what XLA scheduled where, as JSON.

    python tests/support/gpu_schedules.py NAME...

Names are those of ``PROGRAMS``, or "bench of" and an arm of ``jax_ep.bench.latency_beside``. Each line
of the output is an object with "name" and what came of it: "ops", the interesting instructions of the
entry computation in order. An op in flight is "start dispatch 1" and, later, "done dispatch 1",
numbered by kind in the order of starts; an op in line is "plan", a matmul is "matmul", and a kernel of
``grouped_dot`` on n blocks is "grouped_dot n". Or "found", what was looked for in lowered programs.
"""

from __future__ import annotations

import deviceless  # sets what JAX starts with

# isort: split
import contextlib
import json
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bench_schedules
import jax_ep
import kernel_grids
import schedule
from jax_ep import _compat
from jax_ep._backends import region
from jax_ep._core import libraries
from jax_ep._groups import create, gpu_side

RANKS, TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2, 512, 256, 512, 8, 2


def matmul(rows, matrices, sizes):
    """A matmul in place of a grouped one, which XLA compiles sooner.

    XLA would merge matmuls of both chunks with the same matrix, which ``grouped_dot`` never has, so
    the matrix depends on the group sizes.
    """
    return rows @ (matrices[0] * sizes.sum().astype(rows.dtype))


def layer(*, grouped_dot=matmul, hidden=HIDDEN, intermediate=INTERMEDIATE, **options):
    """Output and gradients of ``moe`` over H200s."""
    options["grouped_dot"] = grouped_dot
    group = jax_ep.create_group(MESH, "expert")
    shared = intermediate if options.pop("shared", False) else None

    def loss(x, params):
        y, aux = jax_ep.moe(x, params, group=group, num_experts=EXPERTS, top_k=TOP_K, **options)
        return jnp.square(y.astype(jnp.float32)).sum() + aux.aux_loss

    shapes = jax.eval_shape(
        lambda: jax_ep.init_moe_params(
            jax.random.key(0),
            hidden=hidden,
            intermediate=intermediate,
            num_experts=EXPERTS,
            shared_intermediate=shared,
            dtype=jnp.bfloat16,
        )
    )
    specs = jax_ep.moe_partition_specs(shapes, group=group)
    given = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, spec)),
        (jax.ShapeDtypeStruct((RANKS * TOKENS, hidden), jnp.bfloat16), shapes),
        (P("expert"), specs),
    )
    return jax.value_and_grad(loss, argnums=(0, 1)), given


def layer_without_regions(**options):
    """The same with calls of the same targets in line with the program."""
    region._region = lambda ctx, call, values, *_: call(values)  # for the rest of the process
    jax.clear_caches()
    return layer(**options)


def schedule_of(program, given) -> dict[str, Any]:
    text = deviceless.lowered(program, *given).compile().as_text()
    return {"ops": interesting(schedule.schedule(text))}


def two_in_flight(*, after: bool) -> dict[str, Any]:
    """Whether the second of two dispatches in flight waits for the first."""
    group = jax_ep.create_group(MESH, "expert", channels=2)

    def run(x, idx):
        options = {"group": group, "num_experts": EXPERTS}
        first = jax_ep.dispatch_start(x, idx, **options)
        order = {"after": first} if after else {}
        second = jax_ep.dispatch_start(x + 1, idx, **options, **order)
        return [jax_ep.dispatch_done(ticket).tokens for ticket in (first, second)]

    mapped = jax.shard_map(
        run, mesh=MESH, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    given = [
        jax.ShapeDtypeStruct((RANKS * 8, last), dtype, sharding=NamedSharding(MESH, P("expert")))
        for last, dtype in ((128, jnp.float32), (TOP_K, jnp.int32))
    ]
    text = deviceless.lowered(mapped, *given).compile().as_text()
    return {"found": schedule.chained(text, "jax_ep_dispatch")}


def latency_mode(*, named: bool, grad: bool = False) -> dict[str, Any]:
    """A dispatch and a combine in flight, each with a matmul that may run between its two calls."""
    group = jax_ep.create_group(MESH, "expert", latency_tokens=8, latency_hidden=256)
    options = {"group": group, "config": jax_ep.DispatchConfig(mode="latency")}

    def matmul_beside(ticket, x, matrix):
        def work(x):
            return jnp.sin(x @ matrix)

        return ticket.beside(work, x) if named else (ticket, work(x))

    def run(x, idx, matrix):
        ticket = jax_ep.dispatch_start(x, idx, num_experts=EXPERTS, **options)
        ticket, shared = matmul_beside(ticket, x, matrix)
        out = jax_ep.dispatch_done(ticket)
        ticket = jax_ep.combine_start(jnp.tanh(out.tokens), out.handle, **options)
        ticket, more = matmul_beside(ticket, shared, matrix.T)
        return jax_ep.combine_done(ticket) + more

    def program(x, idx, matrix):
        sharded = (P("expert"), P("expert"), P())
        mapped = jax.shard_map(
            run, mesh=MESH, in_specs=sharded, out_specs=P("expert"), check_vma=False
        )
        return mapped(x, idx, matrix)

    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, spec))
        for shape, dtype, spec in (
            ((RANKS * 8, 256), jnp.bfloat16, P("expert")),
            ((RANKS * 8, TOP_K), jnp.int32, P("expert")),
            ((256, 256), jnp.bfloat16, P()),
        )
    ]
    if not grad:
        return schedule_of(program, given)

    def loss(x, idx, matrix):
        return jnp.square(program(x, idx, matrix).astype(jnp.float32)).sum()

    return schedule_of(jax.grad(loss), given)


def same_text_as_on_real_gpus() -> dict[str, Any]:
    """Whether a program is the same where the devices count as real ones, with a real group."""
    text = deviceless.lowered(*flat(layer(overlap="chunks"))).as_text()
    made = []
    create._groups.clear()
    create._generations.clear()
    patches = [
        mock.patch.object(_compat, "is_compile_only", return_value=False),
        mock.patch.object(libraries, "why_unavailable", return_value=None),
        mock.patch.object(gpu_side.library(), "create_group", lambda *args: made.append(args)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        real = deviceless.lowered(*flat(layer(overlap="chunks"))).as_text()
    return {
        "found": {"same": text == real, "native groups": len(made), "calls": text.count("@jax_ep_")}
    }


def grouped_dots() -> dict[str, Any]:
    """How many kernels a layer has on H200s, and on the CPU device of this process."""
    counts = {}
    cpu = Mesh(np.array(jax.devices("cpu")[:1]), ("expert",))
    for where, mesh in ("h200", MESH), ("cpu", cpu):
        rows, matrices = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), (4, 128, 128)

        def run(rows, matrices, sizes):
            return jax_ep.grouped_dot(rows, matrices, sizes)

        mapped = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("expert")))
            for x in (
                rows,
                jax.ShapeDtypeStruct(matrices, jnp.bfloat16),
                jax.ShapeDtypeStruct(matrices[:1], jnp.int32),
            )
        ]
        platform = "cuda" if mesh is MESH else "cpu"
        lowered = jax.jit(mapped).trace(*given).lower(lowering_platforms=(platform,))
        counts[where] = lowered.as_text().count("custom_call @mosaic_gpu_v2")
    return {"found": counts}


def memory_by_room() -> dict[str, Any]:
    """MiB of temporaries of a layer over 8 H200s, forward and backward, by the room for its rows."""
    take_devices(8)
    bounds = {
        "exact": {"capacity": TOKENS * TOP_K},
        "rank": {"rank_capacity_factor": 1.25},
        "default": {},
    }
    sizes = {"hidden": 2048, "intermediate": 2048}  # rows need most of the memory
    found = {}
    for name, bound in bounds.items():
        compiled = deviceless.lowered(*flat(layer(**sizes, **bound))).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"found": found}


def across_hosts() -> dict[str, Any]:
    """The group of 8 H200s on 4 hosts, and the calls of a layer's step."""
    take_devices(8, hosts=4)
    group = jax_ep.create_group(MESH, "expert")
    compiled = deviceless.lowered(*flat(layer())).compile()
    kinds = [op.kind for op in schedule.schedule(compiled.as_text())]
    return {"found": {"group": repr(group), "calls": [k for k in kinds if "jax_ep_" in k]}}


def take_devices(count: int, hosts: int = 1) -> None:
    """What follows is compiled for so many GPUs."""
    global MESH, RANKS
    RANKS = count
    MESH = Mesh(np.array(deviceless.gpu_devices(count, hosts)), ("expert",))


def flat(made: tuple[Any, Any]) -> tuple[Any, ...]:
    """A program and its arguments."""
    program, given = made
    return program, *given


def bench_chain(name: str) -> dict[str, Any]:
    """The calls and products of two turns of an arm of ``bench.latency_beside``."""
    return {"ops": bench_schedules.turns(MESH, name)}


PROGRAMS = {
    "same text": same_text_as_on_real_gpus,
    "free": lambda: two_in_flight(after=False),
    "after": lambda: two_in_flight(after=True),
    "grouped_dot": grouped_dots,
    "chunks": lambda: schedule_of(*layer(overlap="chunks")),
    # With as many channels inside as outside, few kernels differ.
    "kernels": lambda: schedule_of(
        *layer(overlap="chunks", grouped_dot=None, hidden=1024, intermediate=1024)
    ),
    "latency": lambda: latency_mode(named=True),
    "latency gradient": lambda: latency_mode(named=True, grad=True),
    "latency without names": lambda: latency_mode(named=False),
    "readings of dispatch": lambda: {"ops": bench_schedules.readings(MESH, "dispatch")},
    "readings of combine": lambda: {"ops": bench_schedules.readings(MESH, "combine")},
    "bench on one rank": lambda: schedule_of(*bench_schedules.on_one_rank()),
    "memory": memory_by_room,
    "hosts": across_hosts,
    "shared_expert": lambda: schedule_of(*layer(overlap="shared_expert", shared=True)),
    "chunks without regions": lambda: schedule_of(*layer_without_regions(overlap="chunks")),
}


def interesting(ops: list[schedule.Op]) -> list[str]:
    """What the module's docstring says, of a schedule."""
    shown, started, counts = [], {}, {}
    for op in ops:
        if op.kind == "call-start":
            kind = op.region.removeprefix("jax_ep_").removesuffix("_async") or "nothing"
            counts[kind] = counts.get(kind, 0) + 1
            started[op.name] = f"{kind} {counts[kind]}"
            shown.append(f"start {started[op.name]}")
        elif op.kind == "call-done":
            shown.append(f"done {started[op.operands[0]]}")
        elif op.kind.startswith("jax_ep_"):
            shown.append(op.kind.removeprefix("jax_ep_"))
        elif op.kind == "mosaic_gpu_v2":
            (blocks,) = kernel_grids.blocks_of_kernels(op.kind + op.text)
            shown.append(f"grouped_dot {blocks}")
        elif "matmul" in op.kind:
            shown.append("matmul")
    return shown


if __name__ == "__main__":
    take_devices(RANKS)
    for name in sys.argv[1:]:
        is_arm = name.startswith("bench of ")
        found = bench_chain(name.removeprefix("bench of ")) if is_arm else PROGRAMS[name]()
        print(json.dumps({"name": name} | found), flush=True)
