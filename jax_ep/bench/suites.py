"""Named sets of cases, of sizes that suit the machine, the most informative ones first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from jax_ep._core.types import Layout
from jax_ep.bench import latency_arms, layer, ops, overlap_ops, peers
from jax_ep.bench.cases import (
    COMBINE_HALVES,
    DISPATCH_HALVES,
    Case,
    Op,
    Quantization,
    Routing,
)
from jax_ep.bench.machine import Machine

_LAYOUTS: tuple[Layout, ...] = ("token", "expert")
_ROUTINGS: tuple[Routing, ...] = ("uniform", "group-limited", "zipf", "all-to-one")
_SMALL = Case(tokens=24, hidden=128, top_k=2, experts=8)
_ON_CPU = Case(tokens=512, hidden=1024, top_k=8, experts=64, alignment=8)
_DECODE_TOKENS = (8, 1, 32, 64, 256, 512)  # besides 128


def suite(name: str, machine: Machine) -> list[Case]:
    """The cases of a suite, those with the same inputs side by side.

    * "baselines": every throughput row of docs/performance.md, and XLA's own exchanges; on CPU,
      dispatch and combine beside ``lax.all_to_all`` and the reference.
    * "decode": 1 to 512 tokens a rank, 128 above all, in latency mode and as by default; and each of
      the two calls that ops have in latency mode.
    * "routing": dispatch and combine under every routing pattern.
    * "layer": forward and backward of whole layers, in several implementations.
    * "overlap": ops in flight, each alone and beside a matmul or grouped_dot; layers in chunks. Those
      that have a bound come first.
    * "smoke": a little of everything, for any machine.
    """
    return list(dict.fromkeys(_SUITES[name](machine)))


def throughput_case(machine: Machine) -> Case:
    """The workload of "baselines": 4096 tokens a rank, half of that where ranks share a GPU."""
    if machine.gpus == 0:
        return _ON_CPU
    return Case(tokens=2048, experts=128) if machine.shares_gpus else Case()


def exchanges(base: Case) -> list[Case]:
    """XLA's own exchanges for a workload."""
    base = dataclasses.replace(base, op="exchange", layout="token")
    return [
        dataclasses.replace(base, name=peers.ALL_TO_ALL),
        dataclasses.replace(base, name=peers.RAGGED_DECOMPOSED, compiler_options=peers.DECOMPOSER),
        dataclasses.replace(base, name=peers.RAGGED),
    ]


def round_trips(base: Case) -> list[Case]:
    """Dispatch and combine, by jax_ep, its reference, and an exchange of all rows there and back."""
    base = dataclasses.replace(base, op="round_trip")
    return [
        dataclasses.replace(base, name=name) for name in (None, peers.ALL_TO_ALL, ops.REFERENCE)
    ]


def layers(base: Case, intermediate: int) -> list[Case]:
    """A layer with experts of that width in all its implementations."""
    base = dataclasses.replace(
        base, op="layer", layout="expert", alignment=1, intermediate=intermediate
    )
    arms = [
        dataclasses.replace(
            base, name=arm.name, compiler_options=arm.compiler_options, capacity=arm.capacity
        )
        for arm in layer.ARMS
    ]
    # Right after those of jax_ep, whose floor it is.
    products = dataclasses.replace(base, name=layer.PRODUCTS, capacity="exact")
    return [*arms[:2], products, *arms[2:]]


def chunked_layers(base: Case, width: int) -> list[Case]:
    """A layer in chunks, in line, and their parts, by which it is known what is hidden."""
    base = dataclasses.replace(
        base, op="layer", layout="expert", capacity="default", intermediate=width
    )
    return [dataclasses.replace(base, name=name) for name in layer.CHUNKED]


def overlaps(base: Case, width: int) -> list[Case]:
    """Ops in flight on a workload, beside a matmul of ``[T, H] x [H, width]``."""
    return _arms(base, width, overlap_ops.ARMS)


def _arms(base: Case, width: int, names: Sequence[str]) -> list[Case]:
    base = dataclasses.replace(base, op="overlap", intermediate=width)
    return [dataclasses.replace(base, name=name) for name in names]


def beside_calls(base: Case, width: int) -> list[Case]:
    """Ops of latency mode with compute between their calls; 128 tokens, unless there are fewer."""
    names = [arm for compute in latency_arms.COMPUTE for arm in latency_arms.beside(compute)]
    names += [*latency_arms.BETWEEN_ARMS, *latency_arms.LATE_ARMS]
    return _arms(dataclasses.replace(base, mode="latency"), width, names)


def _of(base: Case, names: tuple[Op, ...], **changes: object) -> list[Case]:
    changed = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
    return [dataclasses.replace(changed, op=op) for op in names]


def _all_ops(base: Case) -> list[Case]:
    """All our ops on a workload; rows come home in full precision only."""
    if base.quantization != "none":
        return _of(base, ("dispatch", "dispatch_cached"))
    return _of(base, ("dispatch", "combine", "dispatch_cached", "plan"))


def _baselines(machine: Machine) -> list[Case]:
    base = throughput_case(machine)
    if machine.gpus == 0:
        return [
            *round_trips(base),
            *(case for at in _LAYOUTS for case in _of(base, ("dispatch", "combine"), layout=at)),
        ]
    quantizations: tuple[Quantization, ...] = ("none", "quantized", "fp8")
    return [
        *(
            case
            for quantization, layout in itertools.product(quantizations, _LAYOUTS)
            for case in _all_ops(
                dataclasses.replace(base, layout=layout, quantization=quantization)
            )
        ),
        *_of(base, ("dispatch", "combine"), capacity="default"),
        *exchanges(base),
        *(
            case
            for at in _LAYOUTS
            for case in _of(base, ("dispatch", "combine"), layout=at, tokens=2 * base.tokens)
        ),
    ]


def _decode(machine: Machine) -> list[Case]:
    base = Case(tokens=128, layout="token")
    if machine.gpus == 0:
        base = dataclasses.replace(_ON_CPU, tokens=128, layout="token")
    expert = dataclasses.replace(base, layout="expert", alignment=16)
    return [
        *_latency(base),
        *_all_ops(dataclasses.replace(base, quantization="quantized")),
        *_all_ops(base),
        *_all_ops(expert),
        *_of(expert, ("dispatch",), quantization="quantized"),
        *_of(expert, ("dispatch",), quantization="fp8"),
        *(
            case
            for tokens in _DECODE_TOKENS
            for case in (
                *_of(base, ("dispatch",), tokens=tokens, quantization="quantized"),
                *_of(base, ("combine",), tokens=tokens),
            )
        ),
        *_two_calls(base),
    ]


def _two_calls(base: Case) -> list[Case]:
    """Each of the two calls that ops have in latency mode."""
    base = dataclasses.replace(base, mode="latency")
    expert = dataclasses.replace(base, layout="expert", alignment=1)
    few = dataclasses.replace(base, tokens=8)
    return [
        case
        for of, quantization in ((base, "quantized"), (expert, "fp8"), (few, "quantized"))
        for case in (
            *_of(of, DISPATCH_HALVES, quantization=quantization),
            *_of(of, COMBINE_HALVES),
        )
    ]


def _latency(base: Case) -> list[Case]:
    """The same in latency mode. Nothing is padded, as its users do."""
    base = dataclasses.replace(base, mode="latency")
    expert = dataclasses.replace(base, layout="expert", alignment=1)
    return [
        *(
            dataclasses.replace(of, op="dispatch", quantization=quantization)
            for of in (base, expert)
            for quantization in ("quantized", "none", "fp8", "fp8-packed")
        ),
        *(dataclasses.replace(of, op="combine") for of in (base, expert)),
        *(
            case
            for tokens in _DECODE_TOKENS
            for case in (
                *_of(base, ("dispatch",), tokens=tokens, quantization="quantized"),
                *_of(base, ("combine",), tokens=tokens),
            )
        ),
    ]


def _routing(machine: Machine) -> list[Case]:
    base = throughput_case(machine)
    if machine.gpus == 0:
        base = dataclasses.replace(base, hidden=128)
    bases = [
        *(dataclasses.replace(base, routing=routing) for routing in _ROUTINGS),
        dataclasses.replace(base, ragged=True),
    ]
    return [
        case
        for base in bases
        for layout in _LAYOUTS
        for case in _of(base, ("dispatch", "combine"), layout=layout)
    ]


def _layer(machine: Machine) -> list[Case]:
    if machine.gpus == 0:
        return layers(dataclasses.replace(_ON_CPU, tokens=128, hidden=256), intermediate=128)
    base = throughput_case(machine)
    training = dataclasses.replace(base, hidden=2048, experts=64, top_k=6)
    wide, many = layers(training, intermediate=1408), layers(base, intermediate=256)
    # The most important comparisons come first, because the last arms take minutes.
    return [*many[:4], *wide[:4], *wide[4:], *many[4:]]


def _overlap(machine: Machine) -> list[Case]:
    base = throughput_case(machine)
    few = Case(tokens=128)
    if machine.gpus == 0:
        base, few = (dataclasses.replace(c, tokens=128, hidden=256) for c in (base, _ON_CPU))
    token = dataclasses.replace(base, layout="token")
    wide = dataclasses.replace(base, alignment=1, experts=16)
    return [
        *beside_calls(dataclasses.replace(few, layout="token"), 2304),
        *_arms(token, 2048, overlap_ops.BOUND_ARMS),
        *(case for width in (2048, 256) for case in chunked_layers(wide, width)),
        *(case for at in _LAYOUTS for case in overlaps(dataclasses.replace(base, layout=at), 2048)),
        *_arms(token, 2048, overlap_ops.GROUPED_ARMS),
    ]


def _smoke(machine: Machine) -> list[Case]:
    del machine
    return [
        *_all_ops(_SMALL),
        *_all_ops(dataclasses.replace(_SMALL, layout="token", quantization="quantized")),
        dataclasses.replace(_SMALL, quantization="fp8"),
        dataclasses.replace(_SMALL, layout="token", quantization="fp8-dense"),
        dataclasses.replace(_SMALL, layout="token", op="combine", ragged=True, dtype="float32"),
        dataclasses.replace(_SMALL, capacity="default"),
        *round_trips(_SMALL),
        *exchanges(_SMALL),
        *layers(dataclasses.replace(_SMALL, dtype="float32"), intermediate=64),
        *_of(_SMALL, (*DISPATCH_HALVES, *COMBINE_HALVES), layout="token", mode="latency"),
        *overlaps(dataclasses.replace(_SMALL, dtype="float32"), width=64),
        *_arms(dataclasses.replace(_SMALL, dtype="float32"), 64, overlap_ops.BOUND_ARMS[-2:]),
        *beside_calls(dataclasses.replace(_SMALL, layout="token"), 64)[-6::2],
        *chunked_layers(dataclasses.replace(_SMALL, dtype="float32", alignment=1), 64),
    ]


_SUITES: dict[str, Callable[[Machine], list[Case]]] = {
    "baselines": _baselines,
    "decode": _decode,
    "routing": _routing,
    "layer": _layer,
    "overlap": _overlap,
    "smoke": _smoke,
}
NAMES = tuple(_SUITES)
