"""Write docs/scale.md from the model of scale, committed records and published figures.

Usage: ``python docs/render_scale.py [--check]``. Prose is in ``scale.in.md``; a marker
``<!-- table: NAME -->`` there becomes the table of that name below. ``scale_data.py`` has the
figures that the model is compared with.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable

import page_text
import scale_data as data

from jax_ep.scale import H200, Workload, predict, show

TEMPLATE = data.ROOT / "docs" / "scale.in.md"
PAGE = data.ROOT / "docs" / "scale.md"
NOTE = """\
<!-- Written by python docs/render_scale.py from docs/scale.in.md, jax_ep/scale/,
benchmarks/published.json and benchmarks/results/; change those. -->"""
_HOSTS = (1, 2, 4, 8, 16, 32)
_HIGHLIGHTED = 64  # ranks
_NUMBER = "{:.4g}"


def render(template: str) -> str:
    """The page."""

    def table(marker: re.Match[str]) -> str:
        if marker[1] not in TABLES:
            raise ValueError(f"scale.in.md: there is no table {marker[1]!r}.")
        return TABLES[marker[1]]()

    page = re.sub(r"<!-- table: (\w+) -->", table, template)
    return page.replace("<!-- generated -->", NOTE)


@functools.cache
def _records() -> list[tuple[str, data.Record]]:
    return list(data.load())


@functools.cache
def _checks() -> list[data.Check]:
    return data.measured(_records())


def _predictions(workload: Workload) -> str:
    rows = []
    for hosts in _HOSTS:
        found = predict(workload, hosts=hosts)
        cells = show.row(found)
        rows.append([f"**{cell}**" for cell in cells] if found.ranks == _HIGHLIGHTED else cells)
    return page_text.table(show.COLUMNS, rows)


def _constants() -> str:
    fitted = data.fit(_records())
    return page_text.table(
        ("constant", "value", "fitted"),
        [
            [f"`{name}`", _NUMBER.format(getattr(H200, name)), _NUMBER.format(value)]
            for name, value in fitted.items()
        ],
    )


def _measured() -> str:
    rows = [
        [
            *(check.name, f"{check.figure:.1f}", f"{check.predicted:.1f}"),
            *(_deviation(check, data.MEASURED_SLACK), "fit" if check.fitted else ""),
        ]
        for check in _checks()
    ]
    return page_text.table(("record", "us", "predicted us", "deviation", "fit"), rows)


def _summary() -> str:
    checks = [check for check in _checks() if not check.fitted]
    sizes = [abs(check.deviation) for check in checks]
    within = sum(size <= data.MEASURED_SLACK for size in sizes)
    return (
        f"Of {len(checks)} records that nothing was fitted on, {within} are within "
        f"{data.MEASURED_SLACK:.0%}; half are within {statistics.median(sizes):.1%}."
    )


def _published() -> str:
    rows = [
        [
            *(check.name, f"{check.figure:g}", f"{check.predicted:.1f}"),
            _deviation(check, data.PUBLISHED_SLACK),
        ]
        for check in data.published()
    ]
    return page_text.table(("figure", "GB/s", "predicted GB/s", "deviation"), rows)


def _deviation(check: data.Check, slack: float) -> str:
    text = f"{check.deviation:+.1%}"
    return f"**{text}**" if abs(check.deviation) > slack else text


def _reasons(checks: Iterable[data.Check]) -> str:
    """The reasons of named deviations of these checks, each with its kinds."""
    kinds = {check.kind for check in checks}
    names: dict[str, list[str]] = {}
    for kind, reason in data.DEVIATIONS.items():
        if kind in kinds:
            words = [f"T = {part}" if part == kind[-1] and len(kind) > 3 else part for part in kind]
            shown = [str(word) for word in words if word not in ("none", "uniform", "exact")]
            names.setdefault(reason, []).append(" ".join(shown))
    return "\n".join(f"* {'; '.join(of_reason)}: {reason}" for reason, of_reason in names.items())


def _skipped() -> str:
    reasons = collections.Counter(
        reason for _, record in _records() if (reason := data.skipped(record)) is not None
    )
    return page_text.table(
        ("records", "why"), [[str(n), why] for why, n in sorted(reasons.items())]
    )


def _machines() -> str:
    machines = json.loads(data.PUBLISHED.read_text())["machines"]
    return page_text.table(
        ("machine", "dispatch GB/s", "combine GB/s", "why"),
        [
            [name, *(f"{m['nvlink_gbs'][op]:g}" for op in ("dispatch", "combine")), m["why"]]
            for name, m in machines.items()
        ],
    )


def _sources() -> str:
    sources = json.loads(data.PUBLISHED.read_text())["sources"]
    return "\n".join(f"* {library}: {source}." for library, source in sources.items())


TABLES: dict[str, Callable[[], str]] = {
    "uniform": lambda: _predictions(Workload()),
    "limited": lambda: _predictions(
        Workload(quantization="quantized", layout="expert", num_groups=8, top_groups=4)
    ),
    "constants": _constants,
    "measured": _measured,
    "summary": _summary,
    "measured_reasons": lambda: _reasons(_checks()),
    "skipped": _skipped,
    "machines": _machines,
    "published": _published,
    "published_reasons": lambda: _reasons(data.published()),
    "sources": _sources,
}


def main() -> int:
    """Write the page, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    page = render(TEMPLATE.read_text())
    if not parser.parse_args().check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print(f"{PAGE.name} is out of date: run python docs/render_scale.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
