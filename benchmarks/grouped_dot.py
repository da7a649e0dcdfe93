"""Times ``jax_ep.grouped_dot`` and its gradients on this GPU beside a dense matmul of the same size.

    python benchmarks/grouped_dot.py --output benchmarks/results/grouped_dot_h200.json

A time is the slope between N and 2N calls, one after the other in one jitted program. The operands
are many times larger than the L2 cache, so no call finds its own there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep

PASSES = ("forward", "d_lhs", "d_rhs")
#          rows, inner, outer, groups, distribution
SHAPES = [
    (32768, 7168, 2048, 8, "equal"),
    (32768, 7168, 2048, 32, "equal"),
    (32768, 7168, 2048, 128, "equal"),
    (32768, 7168, 2048, 32, "zipf"),
    (32768, 7168, 2048, 32, "half used"),
    (32768, 7168, 2048, 32, "one"),
    (32768, 7168, 256, 128, "equal"),
    (16384, 2048, 1024, 16, "equal"),
]


def sizes_of(rows: int, groups: int, distribution: str) -> np.ndarray:
    """Rows of each group."""
    rng = np.random.default_rng(0)
    if distribution == "equal":
        return np.full(groups, rows // groups)
    if distribution == "half used":
        return np.full(groups, rows // groups // 2)
    if distribution == "one":
        return np.eye(groups, dtype=int)[groups // 2] * rows
    return np.bincount((rng.zipf(1.3, rows) - 1) % groups, minlength=groups)


def microseconds(call: Callable[..., Any], operands: list[Any], repeat: int) -> list[float]:
    """Samples of the time of one call; each call depends on the result of the one before."""

    def chain(count: int) -> Callable[..., Any]:
        @jax.jit
        def run(*operands):
            def step(carry, _):
                # The barrier makes each call wait for the one before, so that XLA cannot merge
                # calls.
                tied, carry = jax.lax.optimization_barrier((operands, carry))
                return carry + call(*tied).reshape(-1)[0].astype(jnp.float32), None

            return jax.lax.scan(step, jnp.float32(0), length=count)[0]

        return run

    short, long = chain(repeat), chain(2 * repeat)
    jax.block_until_ready((short(*operands), long(*operands)))
    samples = []
    for _ in range(12):
        times = []
        for run in (short, long):
            begin = time.perf_counter()
            jax.block_until_ready(run(*operands))
            times.append(time.perf_counter() - begin)
        samples.append((times[1] - times[0]) / repeat * 1e6)
    return samples


def calls(
    which: str, sizes: np.ndarray, inner: int, outer: int, rows: int, dtype: Any
) -> tuple[Callable[..., Any], Callable[..., Any], list[Any], list[Any]]:
    """The grouped call, the dense one, and their operands."""
    groups = len(sizes)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, inner), dtype)
    w = jax.random.normal(keys[1], (groups, inner, outer), dtype) / inner**0.5
    d = jax.random.normal(keys[2], (rows, outer), dtype)
    product = jax_ep.grouped_dot
    if which == "forward":
        return (lambda x, w: product(x, w, group_sizes), lambda x, w: x @ w, [x, w], [x, w[0]])
    if which == "d_lhs":

        def d_lhs(d, w):
            zeros = jnp.zeros((rows, inner), dtype)
            return jax.vjp(lambda x: product(x, w, group_sizes), zeros)[1](d)[0]

        return d_lhs, lambda d, w: d @ w.T, [d, w], [d, w[0]]

    def d_rhs(x, d, w):
        return jax.vjp(lambda w: product(x, w, group_sizes), w)[1](d)[0]

    return d_rhs, lambda x, d: x.T @ d, [x, d, w], [x, d]


def is_right(which: str, call: Callable[..., Any], operands: list[Any], sizes: np.ndarray) -> bool:
    """Compares a few rows of a few groups with float64."""
    first = operands[0]
    out = jax.jit(call)(first, *operands[1:])
    begin = np.cumsum(sizes) - sizes
    tolerance = 3e-2 if first.dtype == jnp.bfloat16 else 2e-4
    picks = np.flatnonzero(sizes)[[0, len(np.flatnonzero(sizes)) // 2, -1]]
    for group in picks:
        rows = slice(begin[group], begin[group] + sizes[group])
        a = np.asarray(first[rows]).astype(np.float64)
        if which == "d_rhs":
            d = np.asarray(operands[1][rows]).astype(np.float64)
            want, got = a[:, :64].T @ d, out[group, :64]
        else:
            w = np.asarray(operands[1][group]).astype(np.float64)
            some = slice(0, None, max(1, len(a) // 16))
            want, got = a[some] @ (w if which == "forward" else w.T), out[rows][some]
        scale = np.abs(want).max()
        if not np.abs(np.asarray(got).astype(np.float64) - want).max() <= tolerance * scale:
            return False
    rest = out[jnp.flatnonzero(sizes == 0)] if which == "d_rhs" else out[sizes.sum() :]
    return not bool(jnp.any(rest))


def main() -> None:
    """Run all shapes and write the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))))
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    records = []
    for dtype in arguments.dtypes:
        for index in arguments.shapes if dtype == "bfloat16" else arguments.shapes[1:2]:
            rows, inner, outer, groups, distribution = SHAPES[index]
            sizes = sizes_of(rows, groups, distribution)
            for which in PASSES:
                call, dense, operands, dense_operands = calls(
                    which, sizes, inner, outer, rows, jnp.dtype(dtype)
                )
                correct = is_right(which, call, operands, sizes)
                samples = microseconds(call, operands, arguments.repeat)
                dense_us = float(np.median(microseconds(dense, dense_operands, arguments.repeat)))
                median = float(np.median(samples))
                records.append(
                    {
                        "op": "grouped_dot",
                        "pass": which,
                        "dtype": dtype,
                        "rows": rows,
                        "inner": inner,
                        "outer": outer,
                        "groups": groups,
                        "distribution": distribution,
                        "median_us": round(median, 1),
                        "p10_us": round(float(np.percentile(samples, 10)), 1),
                        "p90_us": round(float(np.percentile(samples, 90)), 1),
                        "dense_us": round(dense_us, 1),
                        "ratio": round(median / dense_us, 3),
                        "tflops": round(2e-6 * int(sizes.sum()) * inner * outer / median, 1),
                        "correct": correct,
                        "device": jax.devices()[0].device_kind,
                        "versions": {"jax": jax.__version__, "jax_ep": jax_ep.__version__},
                        "command": " ".join(["python", *sys.argv]),
                    }
                )
                r = records[-1]
                print(
                    f"{dtype:9} {which:8} {rows} x {inner} x {outer}, {groups:3} groups "
                    f"{distribution:9}: {r['median_us']:8.1f} us [{r['p10_us']}, {r['p90_us']}], "
                    f"dense {r['dense_us']:8.1f}, ratio {r['ratio']:.3f}, {r['tflops']} TFLOP/s"
                    f"{'' if correct else '  WRONG'}",
                    flush=True,
                )
                if arguments.output:
                    arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
