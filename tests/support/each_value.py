"""Few cases of each test that still try everything: each value of each parameter, not each combination.

Parameters that one table gives together (``parametrize(("x", "y"), ...)``) count as one: all rows
of it are kept.

``.ci/run`` tests two versions of Python and JAX. On one it runs all cases. On the other it runs these,
because a difference between versions shows in a test or in one value of a parameter, hardly ever in a
combination of two values alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

Choice = tuple[
    str, ...
]  # names of parameters that are given together, and the text of their values


def _choices(item: pytest.Item) -> frozenset[Choice]:
    """A row of each table of parameters, and a value of each fixture that has several."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    choices = set()
    for marker in item.iter_markers("parametrize"):
        given = marker.args[0] if marker.args else marker.kwargs["argnames"]
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        choices.add((*names, *(repr(params.pop(name)) for name in names)))
    return frozenset(choices | {(name, repr(value)) for name, value in params.items()})


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
