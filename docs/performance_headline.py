"""jax_ep beside the best of the other libraries: the rows, as tables and as sentences."""

from __future__ import annotations

import dataclasses
import re
from statistics import median
from typing import Any

import page_text
from page_text import wrapped
from performance_data import Peer, Record, good, matches, ours, peers_of

START, END = "<!-- headline -->", "<!-- end of headline -->"
NOT_MEASURED = "not measured"
_HEAD = "T, op, layout, jax_ep, best of the others, jax_ep / best, target, floor"


@dataclasses.dataclass(frozen=True)
class Row:
    """One op on one workload.

    Attributes:
        figure: Its entry in ``targets.json``.
        record: jax_ep's record under the conditions of the others; None if there is none.
        peers: The best figure of each library, the fastest first.
    """

    figure: dict[str, Any]
    record: Record | None
    peers: list[Peer]

    @property
    def label(self) -> str:
        """Op and layout."""
        return f"{self.figure['figure']} ({self.figure['match']['layout']})"

    @property
    def tokens(self) -> int:
        """Tokens of a rank."""
        return self.figure["match"]["tokens"]

    @property
    def us(self) -> float | None:
        """jax_ep's time, if there is a valid one."""
        return self.record["median_us"] if self.record and good(self.record) else None

    @property
    def ratio(self) -> float | None:
        """jax_ep's time over that of the fastest other library."""
        return self.us / self.peers[0].us if self.us and self.peers else None

    @property
    def ours(self) -> str:
        """jax_ep's cell."""
        if self.record is None:
            return NOT_MEASURED
        if self.us is None:
            return no_figure(self.record)
        return f"{self.us:.1f}{at_sms(self.record['num_sms'])}"


def rows(targets: dict[str, Any], results: list[Record]) -> list[Row]:
    """A row for each target. Of several records the last with a figure counts, from the newest file."""
    found = []
    for figure in targets["figures"]:
        match = {**figure["match"], **targets["peers"]["conditions"]}
        records = [r for r in ours(results) if matches(r, match)]
        last = next((r for r in reversed(records) if good(r)), records[-1] if records else None)
        found.append(Row(figure, last, peers_of(targets, figure["match"])))
    return found


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    return page_text.table(_HEAD.split(", "), map(_cells, found))


def _cells(row: Row) -> list[str]:
    best = row.peers[0] if row.peers else None
    return [
        *(str(row.tokens), row.figure["figure"], row.figure["match"]["layout"], row.ours),
        f"{best.name} {best.us:.1f}{at_sms(best.num_sms)}" if best else "–",
        f"{row.ratio:.2f}" if row.ratio else "–",
        *(f"{row.figure['target_us']:g}", floor(row.figure)),
    ]


def no_figure(record: Record) -> str:
    """What stands in the place of a figure that does not count."""
    return "too noisy" if record["correct"] and record["median_us"] is None else "wrong or failed"


def at_sms(count: int | None) -> str:
    """The text after a time: the SMs that were given; 0 is the library's own choice."""
    return "" if count is None else f" @{count or 'auto'}"


def floor(figure: dict[str, Any]) -> str:
    """The floor of a target: one figure, or those of pushing and of pulling."""
    return " to ".join(f"{us:g}" for us in figure["floor_us"])


def summary(found: list[Row]) -> str:
    """In how many rows jax_ep is faster, and in which it is not."""
    compared = [(row, row.ratio) for row in found if row.ratio]
    if not compared:
        return "jax_ep and the others were not measured on the same op yet."
    slower = [(row, ratio) for row, ratio in compared if ratio > 1]
    faster = [ratio for _, ratio in compared if ratio <= 1]
    text = f"Of {len(compared)} rows with figures of both, jax_ep is faster in {len(faster)}"
    if faster:
        text += f" ({_range(faster)} of the best other time)"
    missing = sum(row.us is None and bool(row.peers) for row in found)
    rest = f" {missing} more have figures of others only." if missing else ""
    if not slower:
        return f"{text}.{rest}"
    labels: dict[int, list[str]] = {}
    for row, _ in slower:
        labels.setdefault(row.tokens, []).append(row.label)
    where = "; ".join(f"with T = {tokens} {', '.join(some)}" for tokens, some in labels.items())
    ratios = _range([ratio for _, ratio in slower])
    return f"{text} and slower in {len(slower)} ({ratios} of it): {where}.{rest}"


def spread(found: list[Row]) -> str:
    """How far the 10th and 90th percentiles lie from the medians."""
    own = [
        (row.record["p90_us"] - row.record["p10_us"]) / 2 / row.us
        for row in found
        if row.record and row.us
    ]
    theirs = [(peer.p90 - peer.p10) / 2 / peer.us for row in found for peer in row.peers]
    sides = [
        f"{min(shares):.1%} to {max(shares):.1%} for {name} (in the middle {median(shares):.1%})"
        for name, shares in (("jax_ep", own), ("the others", theirs))
        if shares
    ]
    if not sides:
        return ""
    return (
        "Half the distance between the 10th and the 90th percentile, as a share of the median, is "
        f"{' and '.join(sides)}."
    )


def layer(targets: dict[str, Any], results: list[Record]) -> str:
    """The time of a whole layer beside the same layer over XLA's exchange."""
    wanted = {**targets["layer"]["match"], **targets["peers"]["conditions"]}
    other = targets["layer"]["other"]
    layers = [r for r in results if r["op"] == "layer" and matches(r, wanted) and good(r)]
    # Of one host, whose ranks share no GPU.
    layers = [r for r in layers if r["gpus"] == r["ranks"] and "hosts" not in r]
    times = {r["name"]: r["median_us"] for r in layers if r.get("capacity") != "default"}
    any_routing = [r["median_us"] for r in layers if r.get("capacity") == "default"]
    shape = (
        f"T = {wanted['tokens']}, H = {wanted['hidden']}, {wanted['experts']} experts of width "
        f"{wanted['intermediate']}, top-{wanted['top_k']}"
    )
    if "jax_ep" not in times or other not in times:
        return f"A whole layer ({shape}) beside one over `jax.lax.{other}`: {NOT_MEASURED}."
    mine, theirs = times["jax_ep"], times[other]
    text = (
        f"A whole MoE layer, forward and backward ({shape}), takes {mine / 1e3:.2f} ms; the same layer "
        f"over `jax.lax.{other}` takes {theirs / 1e3:.2f} ms, {theirs / mine:.1f} times as long. Both "
        "have room for exactly the rows that come."
    )
    if any_routing:
        ms = f"{any_routing[-1] / 1e3:.2f} ms"
        text += f" With the default capacity, room for any routing, jax_ep takes {ms}."
    return text


def readme(page: str, targets: dict[str, Any], results: list[Record]) -> str:
    """README with its part between the markers written anew.

    Raises:
        ValueError: if the markers are not there, each once and in order.
    """
    parts = re.split(f"({START}|{END})", page)
    if parts[1::2] != [START, END]:
        raise ValueError(f"README.md: expected {START!r} and then {END!r}, once each.")
    found = rows(targets, results)
    chosen = [row for row in found if row.figure.get("headline")]
    text = f"{table(chosen)}\n\n{wrapped(summary(found))}\n\n{wrapped(layer(targets, results))}"
    body = f"\n\n{text}\n\n"
    return "".join([*parts[:2], body, *parts[3:]])


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"
