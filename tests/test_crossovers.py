"""Up to how many tokens latency mode is faster: what ``jax_ep.tune`` times, and what it finds."""

from __future__ import annotations

import pytest

from jax_ep import tune
from jax_ep._groups import tuning
from jax_ep._groups.tuning import CrossoverKey
from jax_ep.bench.cases import Case
from tuning_records import record

CROSSOVER = CrossoverKey("cpu", 2, "dispatch", "token", "bfloat16", 7168)


@pytest.mark.parametrize(
    ("ratios", "most"),
    [
        ({1: 0.5, 128: 0.6, 512: 0.9}, 512),
        ({1: 0.5, 128: 0.9, 512: 1.1}, 128),
        ({1: 1.05, 128: 0.6, 512: 1.1}, 128),  # noise at 1 token, say
        ({1: 0.9, 128: 1.5, 512: 0.9}, 1),
        ({1: 1.0, 128: 1.1}, 0),
    ],
)
def test_crossover_is_where_auto_costs_least(ratios, most):
    times = {tokens: {"latency": 10 * r, "throughput": 10.0} for tokens, r in ratios.items()}
    assert tune.crossover_of(times) == most


def test_crossovers_come_from_right_figures_of_both_modes():
    def both(tokens, latency, throughput, **of_latency):
        of_latency = {"mode": "latency", "tokens": tokens, **of_latency}
        return [
            record(100, latency, **of_latency),
            record(24, throughput, mode="throughput", tokens=tokens),
        ]

    records = [*both(8, 9.0, 20.0), *both(64, None, 21.0), *both(128, 11.0, 23.0)]
    (found,) = tune.best_crossovers(records, tried=6)
    assert found["most_tokens"] == 128
    assert found["median_us"] == {
        "8": {"latency": 9.0, "throughput": 20.0},
        "128": {"latency": 11.0, "throughput": 23.0},
    }
    assert tuning.crossover_key_of(found) == CROSSOVER
    assert not tune.best_crossovers(records, tried=7)  # one is still to come
    assert not tune.best_crossovers([record(16, 5.0), *both(8, None, 20.0)])
    # Where latency mode gave a wrong result, it is not taken, nor for more tokens.
    wrong = both(64, 5.0, 20.0, correct=False)
    (found,) = tune.best_crossovers([*records[:2], *wrong, *records[4:]])
    assert found["most_tokens"] == 8 and list(found["median_us"]) == ["8"]


def test_search_times_both_modes_where_latency_mode_has_room():
    grid = {
        "hidden": [7168],
        "layouts": ["token"],
        "dtypes": ["bfloat16"],
        "quantizations": ["none", "fp8"],
    }
    cases = tune.crossover_cases(Case(top_k=32), ranks=8, tokens=[1, 256, 257, 512], **grid)
    of_one = [("dispatch", "none"), ("combine", "none"), ("dispatch", "fp8")]
    assert [(c.tokens, c.op, c.quantization, c.mode) for c in cases] == [
        (tokens, *op, mode)
        for tokens in (1, 256)
        for op in of_one
        for mode in ("latency", "throughput")
    ]
    assert {(c.num_sms, c.alignment) for c in cases} == {(None, 1)}
    assert [c.tokens for c in tune.crossover_cases(Case(), ranks=2, tokens=[512, 513], **grid)] == [
        512
    ] * 6
