"""Few cases of each test: one, or one for each value of the parameters that JAX's version concerns.

``.ci/run`` tests two versions of Python and JAX. On one it runs all cases. On the other it runs these,
because a difference between versions shows in every case of a test, or in one value of a parameter that
chooses how JAX is used (``CONCERNED``). Sizes, dtypes and options of jax_ep choose other arithmetic of
the same operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

# Names of parameters whose values are other parts of JAX or Flax.
CONCERNED = {"axis_type", "backend", "check_vma", "flax"}

Choice = tuple[str, str]  # name of a parameter and the text of its value


def _choices(item: pytest.Item) -> frozenset[Choice]:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return frozenset((name, repr(params[name])) for name in CONCERNED & set(params))


def cover(cases: Iterable[frozenset[Choice]]) -> list[int]:
    """The indices of few cases that together have all choices of all cases; at least one.

    The greedy algorithm for set cover (Chvátal 1979): it always takes the case that brings most choices
    that none has brought before, the first of several.
    """
    cases = list(cases)
    missing = frozenset().union(*cases)
    taken = [] if missing else [0]
    while missing:
        best = max(range(len(cases)), key=lambda index: len(cases[index] & missing))
        taken.append(best)
        missing -= cases[best]
    return sorted(taken)


def thin_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items in their order, of each test only those that ``cover`` takes."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {cases[index] for cases in tests.values() for index in cover(map(_choices, cases))}
    return [item for item in items if item in kept]
