"""Named sets of cases."""

from __future__ import annotations

import dataclasses
import itertools

from jax_ep._types import Layout
from jax_ep.bench import peers
from jax_ep.bench.cases import OUR_OPS, Case, Quantization
from jax_ep.bench.layer import ARMS

_LAYOUTS: tuple[Layout, ...] = ("token", "expert")
_SMALL = Case(tokens=24, hidden=128, top_k=2, experts=8)


def suite(name: str) -> list[Case]:
    """The cases of a suite, those with the same inputs side by side.

    * "baselines": every throughput row of docs/performance.md, and what XLA has in their place.
    * "decode": 128 tokens a rank.
    * "routing": dispatch and combine under every routing pattern.
    * "layer": forward and backward of whole layers, in several implementations.
    * "smoke": a little of everything, for any machine.
    """
    cases = _SUITES[name]()
    # Processes start with one set of flags; a stable sort keeps the rest in order.
    return sorted(cases, key=lambda case: case.xla_flags)


def _ours(base: Case) -> list[Case]:
    """All our ops on a workload; rows come home in full precision only."""
    return [
        dataclasses.replace(base, op=op)
        for op in OUR_OPS
        if op != "combine" or base.quantization == "none"
    ]


def exchanges(base: Case) -> list[Case]:
    """What XLA has for a workload."""
    base = dataclasses.replace(base, op="exchange", layout="token")
    return [
        dataclasses.replace(base, name=peers.ALL_TO_ALL),
        dataclasses.replace(base, name=peers.RAGGED),
        dataclasses.replace(base, name=peers.RAGGED_DECOMPOSED, xla_flags=peers.DECOMPOSER_FLAG),
    ]


def layers(base: Case, intermediate: int) -> list[Case]:
    """A layer with experts of that width in all its implementations."""
    base = dataclasses.replace(
        base, op="layer", layout="expert", alignment=1, intermediate=intermediate
    )
    return [dataclasses.replace(base, name=arm.name, xla_flags=arm.xla_flags) for arm in ARMS]


def _baselines() -> list[Case]:
    quantizations: tuple[Quantization, ...] = ("none", "quantized", "fp8")
    cases = [
        case
        for layout, quantization in itertools.product(_LAYOUTS, quantizations)
        for case in _ours(Case(layout=layout, quantization=quantization))
    ]
    return cases + exchanges(Case())


def _decode() -> list[Case]:
    token = Case(layout="token", tokens=128)
    return [
        *_ours(dataclasses.replace(token, quantization="quantized")),
        *_ours(token),
        *_ours(Case(layout="expert", tokens=128, alignment=16)),
    ]


def _routing() -> list[Case]:
    bases = [
        *(Case(routing=r) for r in ("uniform", "group-limited", "zipf", "all-to-one")),
        Case(ragged=True),
    ]
    return [
        dataclasses.replace(base, op=op, layout=layout)
        for base in bases
        for layout in _LAYOUTS
        for op in ("dispatch", "combine")
    ]


def _layer() -> list[Case]:
    training = Case(hidden=2048, experts=64, top_k=6)
    return layers(Case(), intermediate=256) + layers(training, intermediate=1408)


def _smoke() -> list[Case]:
    cases = [
        *_ours(_SMALL),
        *_ours(dataclasses.replace(_SMALL, layout="token", quantization="quantized")),
        dataclasses.replace(_SMALL, quantization="fp8"),
        dataclasses.replace(_SMALL, layout="token", quantization="fp8-dense"),
        dataclasses.replace(_SMALL, layout="token", op="combine", ragged=True, dtype="float32"),
        *exchanges(_SMALL),
    ]
    return cases + layers(dataclasses.replace(_SMALL, dtype="float32"), intermediate=64)


_SUITES = {
    "baselines": _baselines,
    "decode": _decode,
    "routing": _routing,
    "layer": _layer,
    "smoke": _smoke,
}
NAMES = tuple(_SUITES)
