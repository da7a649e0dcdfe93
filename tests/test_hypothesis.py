"""Random sizes, routings and arguments: both backends against the oracle, to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

import jax_ep
import logical_hosts
import oracle
from conftest import BACKENDS
from shapes import DTYPES
from spmd import fields, make_group, stacked_jit


@dataclasses.dataclass(frozen=True)
class Draw:
    """Static arguments of one example, and the seed of its data."""

    ranks: int
    tokens: int
    local_experts: int
    top_k: int
    layout: str
    alignment: int
    bound: dict[str, Any]
    quantization: str | None
    dtype: str
    blocks: int
    seed: int

    @property
    def experts(self) -> int:
        return self.ranks * self.local_experts

    @property
    def hidden(self) -> int:
        unit = 128 if self.quantization else 16 // DTYPES[self.dtype].itemsize
        return unit * self.blocks


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    devices = jax.device_count()
    ranks = draw(st.integers(1, min(8, devices)))
    local_experts = draw(st.integers(1, 5))
    layout = draw(st.sampled_from(["expert", "token"]))
    alignment = draw(st.sampled_from([1, 2, 3, 7, 8, 128]))
    multiple = alignment if layout == "expert" else 1
    bounds = [st.just({}), st.integers(1, 16).map(lambda n: {"capacity": n * multiple})]
    if layout == "expert":
        factor = st.floats(0.01, 0.7)
        bounds.append(factor.map(lambda f: {"capacity_factor": f}))
        bounds.append(factor.map(lambda f: {"rank_capacity_factor": f}))
        bounds.append(factor.map(lambda f: {"capacity_factor": f, "rank_capacity_factor": 0.4}))
    return Draw(
        ranks=ranks,
        tokens=draw(st.integers(0, 17)),
        local_experts=local_experts,
        top_k=draw(st.integers(1, min(32, ranks * local_experts))),
        layout=layout,
        alignment=alignment,
        bound=draw(st.one_of(bounds)),
        quantization=draw(st.sampled_from([None, None, "f32", "ue8m0"])),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        blocks=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def data(d: Draw) -> dict[str, np.ndarray]:
    """Routings from uniform to very skewed, with every kind of invalid entry."""
    rng = np.random.default_rng(d.seed)
    shape = (d.ranks, d.tokens, d.top_k)
    skew = rng.choice([0.2, 1.0, 5.0])
    idx = (rng.random(shape) ** skew * (d.experts + 1)).astype(np.int32) - rng.integers(0, 2, shape)
    extreme = rng.random(shape) < 0.02
    idx[extreme] = rng.choice([-(2**31), 2**31 - 1, -2, d.experts], extreme.sum())
    return {
        "topk_idx": idx.astype(np.int32),
        "x": rng.standard_normal((d.ranks, d.tokens, d.hidden)).astype(DTYPES[d.dtype]),
        "dy": rng.standard_normal((d.ranks, d.tokens, d.hidden)).astype(DTYPES[d.dtype]),
        "weights": rng.standard_normal(shape).astype(np.float32),
    }


def expected(d: Draw, a: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bounds = oracle.limits(
        num_ranks=d.ranks,
        num_tokens=d.tokens,
        top_k=d.top_k,
        num_experts=d.experts,
        layout=d.layout,
        alignment=d.alignment,
        **d.bound,
    )
    plan = oracle.plan(
        a["topk_idx"],
        num_experts=d.experts,
        layout=d.layout,
        alignment=d.alignment,
        bounds=bounds,
    )
    event(f"drops rows: {bool(plan.num_dropped.any())}")
    x = a["x"]
    if d.quantization:
        x = oracle.dequantize(*oracle.quantize(x, d.quantization), x.dtype)
    per_host = logical_hosts.of_first(d.ranks)
    found = plan.arrays(per_host)
    rows, row_weights = oracle.move(x, plan), oracle.move_weights(a["weights"], plan)
    found |= {"rows": rows, "row_weights": row_weights}
    fused = row_weights if d.layout == "expert" else None
    found["y"] = oracle.combine(rows, plan, fused, per_host)
    if fused is None:
        d_rows, d_row_weights = oracle.move(a["dy"], plan), np.zeros_like(row_weights)
    else:
        d_rows, d_row_weights = oracle.combine_vjp(a["dy"], rows, fused, plan)
    found["dx"] = oracle.combine(d_rows, plan, ranks_per_host=per_host)
    found["dw"] = oracle.send_home(d_row_weights, plan)
    return found


def program(d: Draw, group: jax_ep.Group):
    wire = {"quantization": "fp8", "scale_format": d.quantization} if d.quantization else {}

    def forward(x, weights, idx):
        out = jax_ep.dispatch(
            x,
            idx,
            weights,
            group=group,
            num_experts=d.experts,
            layout=d.layout,
            alignment=d.alignment,
            **d.bound,
            **wire,
        )
        fused = out.weights if d.layout == "expert" else None
        return jax_ep.combine(out.tokens, out.handle, group=group, weights=fused), out

    def run(a):
        y, pull, out = jax.vjp(
            lambda x, w: forward(x, w, a["topk_idx"]), a["x"], a["weights"], has_aux=True
        )
        dx, dw = pull(a["dy"])
        found = {"rows": out.tokens, "row_weights": out.weights, "y": y, "dx": dx, "dw": dw}
        return fields(out.handle) | found

    return run


# Rows of float32 that end in half of the eight channels that a GPU's thread holds.
HALF_A_VECTOR = Draw(
    ranks=2,
    tokens=9,
    local_experts=4,
    top_k=6,
    layout="expert",
    alignment=3,
    bound={},
    quantization=None,
    dtype="float32",
    blocks=1,
    seed=2335,
)


@pytest.mark.slow
@example(HALF_A_VECTOR)
@given(draws())
def test_random(d: Draw):
    arrays = data(d)
    wanted = expected(d, arrays)
    for backend in BACKENDS:
        group = make_group(d.ranks, backend)
        found = stacked_jit(program(d, group), group.mesh)(arrays)
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            oracle.assert_same(found[name], want, f"{name}, {backend}")
