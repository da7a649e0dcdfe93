"""Chains of ``jax_ep.bench``, compiled for H200s without a GPU: what XLA makes of them.

A part of ``gpu_schedules.py``, which sets what JAX starts with.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import deviceless
import jax_ep
import schedule
from jax_ep.bench import (
    clock,
    half_ops,
    latency_arms,
    latency_beside,
    latency_turns,
    ops,
    overlap_ops,
)
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem

EXPERTS, TOP_K = 8, 2


def _kinds(mesh: Mesh, case: Case, make: Any, *operands: jax.ShapeDtypeStruct) -> list[str]:
    """What a benchmark's chain of ops of latency mode is compiled to.

    ``make(session, problem)`` gives the chain, a function of sets, of which there is one, and operands.
    """
    ranks = mesh.size
    group = jax_ep.create_group(mesh, "expert", latency_tokens=8, latency_hidden=256)
    session = mock.Mock(group_of=lambda case: group, group=group, ranks=ranks, axis="expert")
    session.on_gpu = True
    problem = Problem(case, ranks)
    given = (
        jax.ShapeDtypeStruct((8, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, TOP_K), jnp.int32),
        jax.ShapeDtypeStruct((8, TOP_K), jnp.float32),
    )

    def run(inputs, *operands):
        if "combine" in (case.op, *(case.name or "").split()):
            dispatch = dataclasses.replace(case, op="dispatch", name=None)
            out = ops.step_of(session, dispatch, problem).run(inputs)
            inputs = out.tokens, out.handle
        return make(session, problem)([inputs], *operands)

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    sharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (ranks * x.shape[0], *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, P("expert"))
        ),
        (given, *operands),
    )
    found = schedule.schedule(deviceless.lowered(mapped, *sharded).compile().as_text())
    quiet = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")
    return [op.kind.removeprefix("jax_ep_") for op in found if op.kind not in quiet]


def _case(op: str, name: str | None = None) -> Case:
    """An op of latency mode, or an arm of ``bench.latency_beside``."""
    return Case(
        op=op,
        name=name,
        layout="token",
        mode="latency",
        tokens=8,
        hidden=256,
        top_k=TOP_K,
        experts=EXPERTS,
        intermediate=256,
    )


def readings(mesh: Mesh, op: str) -> list[str]:
    """The benchmark's chain of two ops in two calls: what runs between their first reading and last."""
    case = _case(op)

    def make(session, problem):
        return half_ops.chain(session, case, problem, length=2)

    kinds = _kinds(mesh, case, make, jax.ShapeDtypeStruct((1,), jnp.int32))
    clocks = [place for place, kind in enumerate(kinds) if kind == "clock"]
    return kinds[clocks[2 * half_ops.READINGS] : clocks[-1] + 1]


def turns(mesh: Mesh, name: str) -> list[str]:
    """The calls and products of two turns of a chain of ``bench.latency_beside``."""
    case = _case("overlap", name)
    compute = latency_arms.MATMUL if name.endswith("matmul") else latency_arms.GROUPED

    def make(session, problem):
        arm = latency_arms.parse(name)
        whole = latency_beside._whole(case, arm.op)
        timed = latency_turns.Timed(session, whole, problem, latency_beside._work(session, compute))

        def chain(sets, *operands):
            number = jnp.int32(3)
            if arm.kind:
                turn = timed.between if arm.kind == latency_arms.BETWEEN else timed.late
                return latency_turns.program(turn, 2, sets, operands, number)
            step = latency_beside.step_of(session, case, problem)
            inputs = (sets[0], operands) if arm.op else operands
            first = step.run(inputs)
            return step.run(step.link(inputs, first, clock.no_clock))

        return chain

    operands = (
        jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((256, 256) if compute == "matmul" else (2, 256, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    kinds = _kinds(mesh, case, make, *operands)
    shown = {"mosaic_gpu_v2": "grouped_dot"}
    kinds = ["matmul" if "matmul" in kind else shown.get(kind, kind) for kind in kinds]
    wanted = ("matmul", "grouped_dot", "clock", "while")
    return [kind for kind in kinds if kind in wanted or "latency" in kind]


def on_one_rank() -> tuple[Any, list[Any]]:
    """Two turns of the chain of a dispatch in flight beside ``grouped_dot``, and arguments."""
    mesh = Mesh(np.array(deviceless.gpu_devices(1)), ("expert",))
    case = dataclasses.replace(_case("overlap"), mode="auto", experts=4)
    arm = "dispatch" + overlap_ops.BESIDE + overlap_ops.LEAVING
    group = jax_ep.create_group(mesh, "expert")
    session = mock.Mock(group=group, mesh=mesh, ranks=1)

    def run(x, topk_idx, weight):
        out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=4)
        inputs = x, out.handle, out.tokens, weight
        step = overlap_ops.step_of(session, case, arm, inputs)
        first = step.run(inputs)
        return step.run(step.link(inputs, first, clock.no_clock))

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))
        for shape, dtype in (
            ((256, 256), jnp.bfloat16),
            ((256, TOP_K), jnp.int32),
            ((2, 256, 256), jnp.bfloat16),
        )
    ]
    return mapped, given
