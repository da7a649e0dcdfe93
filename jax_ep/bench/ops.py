"""Our own ops: the step of each, its inputs, and whether its result is right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep._backends import native
from jax_ep._core.types import Dispatched, Handle, Quantized
from jax_ep._groups import gpu_side, tuning
from jax_ep._groups.group import latency_sms_of, sms_of
from jax_ep._ops import gradients
from jax_ep._ops.options import PlanOptions
from jax_ep.bench import expected, memory, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.clock import Clock
from jax_ep.bench.problems import Problem, row_factors
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Step

REFERENCE = "reference"
_LATENCY_TARGETS = {
    "dispatch": ("jax_ep_latency_dispatch",),
    "combine": ("jax_ep_latency_combine",),
    "round_trip": ("jax_ep_latency_dispatch", "jax_ep_latency_combine"),
}
_TARGETS = {
    "plan": ("jax_ep_plan",),
    "dispatch": ("jax_ep_plan", "jax_ep_dispatch"),
    "dispatch_cached": ("jax_ep_dispatch",),
    "combine": ("jax_ep_combine",),
    "round_trip": ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine"),
}


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one of our ops, by the library's kernels or by its reference."""
    problem = session.problem(case)
    step, sets = step_of(session, case, problem), sets_of(session, case, problem)
    is_native = _group(session, case).backend != "reference"
    moved = traffic.of_op(case, problem)
    written = problem.capacity * case.hidden * 2 if case.op != "plan" else 0
    chain = session.chain(
        10 + moved.wire / 3e5 + written / 2e6, calls=_calls(session, case) if is_native else ()
    )
    measured = timing.measure(step, sets, session.mesh, chain)
    link = session.link(case.tokens, case.top_k)
    wrong = wrong_of(session, case, problem, measured.result, measured.last_set)
    wrongs = [text for text in session.exchange(wrong) if text]
    return session.record(
        case,
        session.slowest(measured.spread).less(link.median),
        moved,
        correct=not wrongs,
        num_sms=num_sms_of(session, case),
        name=None if is_native else REFERENCE,
        workspace_bytes=native.workspace_bytes(session.group_of(case)),
        scratch_bytes=memory.scratch_bytes(measured.text),
        staged=_staged(session),
        error=wrongs[0] if wrongs else None,
    )


def config(case: Case) -> jax_ep.DispatchConfig | None:
    """What the case says about the use of the machine, or None."""
    if case.num_sms is None and case.mode == "auto":
        return None
    return jax_ep.DispatchConfig(num_sms=case.num_sms, mode=case.mode)


def _group(session: Session, case: Case) -> jax_ep.Group:
    return session.reference_group if case.name == REFERENCE else session.group_of(case)


def _calls(session: Session, case: Case) -> tuple[str, ...]:
    """The custom calls of an op."""
    latency = case.mode == "latency" and session.group.backend == "cuda"
    return (_TARGETS | _LATENCY_TARGETS if latency else _TARGETS)[case.op]


def options(case: Case, session: Session) -> dict[str, Any]:
    """Arguments of ``jax_ep.dispatch`` with and without a handle."""
    packs = case.quantization == "fp8-packed"
    return {
        "group": _group(session, case),
        "config": config(case),
        "quantization": "fp8" if case.casts else None,
        "output": "quantized" if case.quantization in ("fp8", "fp8-packed") else None,
        "scale_format": "ue8m0_packed" if packs else "f32",
    }


def num_sms_of(session: Session, case: Case) -> int | None:
    """SMs that the op takes, or None where it takes none."""
    if not session.on_gpu:
        return None
    cast = "f32" if case.casts else None
    rows = tuning.rows_name(case.row_dtype, cast, case.quantization == "fp8-dense")
    op: tuning.TunedOp = "dispatch"
    if case.op in ("plan", "combine"):
        op = "plan" if case.op == "plan" else "combine"
    if case.mode == "latency" and case.op in _LATENCY_TARGETS:
        group = session.group_of(case)
        wanted = latency_sms_of(group, num_tokens=case.tokens, requested=case.num_sms)
        return max(min(wanted, gpu_side.max_blocks(group.id)), 2) if wanted else None
    wanted = sms_of(
        session.group,
        op=op,
        layout=case.layout,
        rows="" if op == "plan" else rows,
        hidden=0 if op == "plan" else case.hidden,
        num_tokens=case.tokens,
        requested=case.num_sms,
    )
    if session.group.backend != "cuda":
        return wanted
    return min(wanted, gpu_side.max_blocks(session.group.id))


def _staged(session: Session) -> bool:
    return gpu_side.why_staged(session.group.id) is not None


def routed_of(case: Case, problem: Problem) -> dict[str, Any]:
    """Arguments of ``jax_ep.dispatch`` without a handle, besides ``options``."""
    return {
        "num_experts": case.experts,
        "layout": case.layout,
        "alignment": case.alignment,
        "capacity": problem.capacity,
    }


def step_of(session: Session, case: Case, problem: Problem) -> Step:
    """One op of a chain."""
    given, routed = options(case, session), routed_of(case, problem)

    def dispatch(inputs: Any) -> Dispatched:
        x, topk_idx, weights = inputs
        return jax_ep.dispatch(x, topk_idx, weights, **routed, **given)

    def plan(topk_idx: jax.Array) -> Handle:
        options = PlanOptions(group=given["group"], **routed, config=given["config"])
        return gradients.plan(options, topk_idx)

    def dispatch_cached(inputs: Any) -> Dispatched:
        x, handle, weights = inputs
        return jax_ep.dispatch(x, None, weights, handle=handle, **given)

    def combine(inputs: Any) -> jax.Array:
        rows, handle = inputs
        return jax_ep.combine(rows, handle, group=given["group"], config=given["config"])

    def round_trip(inputs: Any) -> jax.Array:
        out = dispatch(inputs)
        return jax_ep.combine(out.tokens, out.handle, group=given["group"], config=given["config"])

    def link_ids(inputs: Any, out: Any, now: Clock) -> Any:
        x, topk_idx, weights = inputs
        result = out.tokens if isinstance(out, Dispatched) else out
        return x, now(timing.after(topk_idx, result)), weights

    def link_handle(inputs: Any, out: Any, now: Clock) -> Any:
        rows, handle, *weights = inputs
        result = out.tokens if isinstance(out, Dispatched) else out
        topk_idx = now(timing.after(handle.topk_idx, result))
        if given["group"].backend == "reference":  # which may not read topk_idx
            handle = jax.tree.map(lambda leaf: timing.after(leaf, result), handle)
        return rows, dataclasses.replace(handle, topk_idx=topk_idx), *weights

    def link_plan(topk_idx: jax.Array, handle: Handle, now: Clock) -> jax.Array:
        return now(timing.after(topk_idx, handle.recv_src))

    return {
        "plan": Step(plan, link_plan),
        "dispatch": Step(dispatch, link_ids),
        "dispatch_cached": Step(dispatch_cached, link_handle),
        "combine": Step(combine, link_handle),
        "round_trip": Step(round_trip, link_ids),
    }[case.op]


def sets_of(session: Session, case: Case, problem: Problem) -> list[Any]:
    """Inputs of the step: those of a dispatch, or what a dispatch has given for them."""
    sets: list[Any] = []
    prepare = _prepare(session, case, problem)
    for index, topk in enumerate(problem.topk_idx):
        topk_idx = session.put(topk.__getitem__)
        if case.op == "plan":
            sets.append(topk_idx)
            continue
        x: Any = session.put(functools.partial(problem.part, index, 0))
        if case.quantization == "quantized":
            x = Quantized(x, session.put(functools.partial(problem.part, index, 1)))
        weights = None
        if case.weights:
            weights = session.put(functools.partial(problem.weights, index))
        inputs = (x, topk_idx, weights)
        if case.op in ("dispatch", "round_trip"):
            sets.append(inputs)
            continue
        sets.append(prepare(inputs))
    return sets


def _prepare(session: Session, case: Case, problem: Problem) -> Any:
    """From a dispatch's inputs to those of an op that follows a dispatch."""
    dispatch = step_of(session, dataclasses.replace(case, op="dispatch"), problem).run

    def prepare(inputs: Any) -> Any:
        out = dispatch(inputs)
        if case.op == "dispatch_cached":
            return inputs[0], out.handle, inputs[2]
        factors = jnp.asarray(row_factors(problem.capacity))[:, None]
        rows = out.tokens.astype(jnp.float32) * factors
        return rows.astype(out.tokens.dtype), out.handle

    return session.on_all_ranks(prepare)


def wrong_of(session: Session, case: Case, problem: Problem, out: Any, index: int) -> str:
    """What is wrong with the result of an op on a set of inputs, or ""."""
    return _CHECKS[case.op](session, case, problem, out, index)


def _check_plan(session: Session, case: Case, problem: Problem, out: Handle, index: int) -> str:
    for rank, sources in session.parts(out.recv_src).items():
        if not np.array_equal(sources, problem.sources(index, rank)):
            return f"rank {rank}: the rows' sources are not those of the routing"
    return ""


def _check_dispatch(
    session: Session, case: Case, problem: Problem, out: Dispatched, index: int
) -> str:
    """Rows, scales and weights, bit by bit; the text says what differs."""
    wrong = _check_plan(session, case, problem, out.handle, index)
    if wrong:
        return wrong
    tokens = out.tokens if isinstance(out.tokens, Quantized) else (out.tokens,)
    everyone = [
        np.concatenate(parts)
        for parts in zip(
            *(_sent(case, problem, index, rank) for rank in range(problem.ranks)), strict=True
        )
    ]
    for name, array, sent in zip(("rows", "scales"), tokens, everyone, strict=False):
        for rank, got in session.parts(array).items():
            sources = problem.sources(index, rank)
            if name == "scales" and case.quantization == "fp8-packed":
                got = expected.unpacked(got, len(sources), case.hidden // 128)
            if not _are_rows_of(got, sent, sources, case.top_k if case.layout == "expert" else 1):
                return f"rank {rank}: {name} differ from those sent"
    if out.weights is None:
        return ""
    weights = np.concatenate([problem.weights(index, rank) for rank in range(problem.ranks)])
    ids = problem.topk_idx[index].reshape(weights.shape)
    local = case.experts // problem.ranks
    for rank, got in session.parts(out.weights).items():
        sources = problem.sources(index, rank)
        if case.layout == "expert":
            wanted = np.where(sources >= 0, weights.reshape(-1)[sources], np.float32(0))
        else:
            there = (sources >= 0)[:, None] & (ids[sources] >= 0)
            mine = there & (ids[sources] // local == rank)
            wanted = np.where(mine, weights[sources], np.float32(0))
        if not np.array_equal(got, wanted):
            return f"rank {rank}: weights differ from those sent"
    return ""


def _are_rows_of(got: np.ndarray, sent: np.ndarray, sources: np.ndarray, per_token: int) -> bool:
    """Whether rows are those of their sources' tokens, and zero where they have none."""

    def is_right(part: slice) -> bool:
        want = sent[np.maximum(sources[part], 0) // per_token]
        want[sources[part] < 0] = 0
        return expected.same_bits(got[part], want)

    return len(got) == len(sources) and all(expected.by_parts(is_right, len(sources)))


def _sent(case: Case, problem: Problem, index: int, rank: int) -> tuple[np.ndarray, ...]:
    """A rank's tokens in the form that they must arrive in."""
    rows = problem.rows(index, rank)
    if not case.casts:
        return rows

    def cast(part: slice) -> tuple[np.ndarray, ...]:
        packs = case.quantization == "fp8-packed"
        quantized = expected.quantize(rows[0][part], powers_of_two=packs)
        if case.quantization != "fp8-dense":
            return quantized
        return (expected.dequantize(*quantized, rows[0].dtype.name),)

    parts = expected.by_parts(cast, len(rows[0]))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _check_combine(
    session: Session, case: Case, problem: Problem, out: jax.Array, index: int
) -> str:
    """Each token's sum, bit by bit."""
    return _check_sums(session, case, problem, out, index, row_factors(problem.capacity))


def _check_round_trip(
    session: Session, case: Case, problem: Problem, out: jax.Array, index: int
) -> str:
    """The same for rows that come home as they went."""
    return _check_sums(session, case, problem, out, index, np.ones(problem.capacity, np.float32))


def _check_sums(
    session: Session,
    case: Case,
    problem: Problem,
    out: jax.Array,
    index: int,
    row_factor: np.ndarray,
) -> str:
    ids = problem.topk_idx[index]
    # Of the rows on each rank, by (source, token, entry); in layout "token" all entries share one.
    shape = (*ids.shape[:2], case.top_k if case.layout == "expert" else 1)
    factors = []
    for rank in range(problem.ranks):
        sources = problem.sources(index, rank)
        of_rank = np.full(np.prod(shape), np.nan, np.float32)
        of_rank[sources[sources >= 0]] = row_factor[sources >= 0]
        of_rank = of_rank.reshape(shape)
        if case.layout == "expert":  # summed by ascending local expert
            of_rank = np.take_along_axis(of_rank, np.argsort(ids, axis=-1), axis=-1)
        factors.append(of_rank)
    for rank, got in session.parts(out).items():
        x = problem.rows(index, rank)[0]

        def sums(part: slice, x: np.ndarray = x, rank: int = rank) -> np.ndarray:
            return expected.rounded_sums(x[part], [f[rank][part] for f in factors])

        want = np.concatenate(expected.by_parts(sums, len(x)))
        if not expected.same_bits(got, want):
            error = np.abs(got.astype(np.float32) - want.astype(np.float32)).max()
            return f"rank {rank}: sums are off by up to {error}"
    return ""


_CHECKS: dict[str, Callable[[Session, Case, Problem, Any, int], str]] = {
    "plan": _check_plan,
    "dispatch": _check_dispatch,
    "dispatch_cached": _check_dispatch,
    "combine": _check_combine,
    "round_trip": _check_round_trip,
}
