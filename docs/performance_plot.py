"""docs/performance.png: jax_ep's times and those of others as bars.

The picture contains a hash of its data, because its bytes differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from typing import Any

from performance_headline import Row, at_sms, floor

KEYWORD = "jax_ep data"  # of the hash among the picture's texts
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colours of Okabe and Ito, which all kinds of colour vision can tell apart; by beginning of the
# name.
_COLOURS = {
    "jax_ep": "#0072B2",
    "DeepEP V2": "#E69F00",
    "DeepEP V1": "#CC79A7",
    "NCCL EP": "#999999",
}
_TITLES = {4096: "Prefill", 128: "Decode"}
_BAR, _GAP = 1.0, 1.1  # height of a bar, and space between ops


def data_hash(rows: list[Row], machine: str) -> str:
    """A hash of all that the picture shows."""
    return hashlib.sha256(json.dumps([machine, _shown(rows)]).encode()).hexdigest()


def stored_hash(path: pathlib.Path) -> str | None:
    """The hash in a picture; None if there is no picture, or none with a hash."""
    content = path.read_bytes() if path.exists() else b""
    if not content.startswith(_SIGNATURE):
        return None
    place = len(_SIGNATURE)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        keyword, _, text = content[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and keyword == KEYWORD.encode():
            return text.decode("latin-1")
        place += length + 12  # length, kind and checksum besides
    return None


def _shown(rows: list[Row]) -> list[dict[str, Any]]:
    """Each row's bars: name, time, percentiles and SMs."""
    shown = []
    for row in rows:
        bars: list[list[Any]] = [["jax_ep", None, None, None, row.ours]]
        if row.record and row.us:
            spread = [round(row.record[field], 1) for field in ("p10_us", "p90_us")]
            bars = [["jax_ep", round(row.us, 1), *spread, row.ours]]
        for peer in row.peers:
            text = f"{peer.us:.1f}{at_sms(peer.num_sms)}"
            bars.append([peer.name, *(round(x, 1) for x in (peer.us, peer.p10, peer.p90)), text])
        figure = row.figure
        label = f"{figure['figure']}\nlayout {figure['match']['layout']}"
        floors = [floor(figure), figure["floor_us"][0]]
        shown.append({"tokens": row.tokens, "label": label, "bars": bars, "floor": floors})
    return shown


def draw(rows: list[Row], machine: str, path: pathlib.Path) -> None:
    """Draw the rows, a panel for each number of tokens, and store their hash in the picture.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = _shown(rows)
    sizes = list(dict.fromkeys(entry["tokens"] for entry in shown))
    labels = list(dict.fromkeys(entry["label"] for entry in shown))
    slots = [
        max(len(entry["bars"]) for entry in shown if entry["label"] == label) for label in labels
    ]
    tops = [sum(slots[:i]) * _BAR + i * _GAP for i in range(len(slots))]
    height = tops[-1] + slots[-1] * _BAR
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure, axes = pyplot.subplots(
            1, len(sizes), sharey=True, squeeze=False, figsize=(10, 1.6 + 0.19 * height)
        )
        for panel, tokens in zip(axes[0], sizes, strict=True):
            places = dict(zip(labels, zip(tops, slots, strict=True), strict=True))
            entries = [entry for entry in shown if entry["tokens"] == tokens]
            _panel(panel, entries, places)
            panel.set_title(
                f"{_TITLES.get(tokens, 'Batch')}: T = {tokens} tokens a rank",
                loc="left",
                fontsize=10,
            )
        centres = [top + slot * _BAR / 2 for top, slot in zip(tops, slots, strict=True)]
        axes[0][0].set_yticks(centres, labels, fontsize=9)
        axes[0][0].set_ylim(height + _GAP / 2, -_GAP / 2)
        figure.suptitle(
            f"Time of one op on {machine} (shorter is better)", x=0.01, ha="left", fontsize=12
        )
        _legend(figure)
        figure.tight_layout(rect=(0, 0.035, 1, 1))
        metadata = {KEYWORD: data_hash(rows, machine), "Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)
        pyplot.close(figure)


def _panel(panel: Any, entries: list[dict[str, Any]], places: dict[str, tuple[float, int]]) -> None:
    """The bars of one number of tokens, each with its time; one far too long is cut."""
    limit = _limit(entries)
    for label in places.keys() - {entry["label"] for entry in entries}:
        top, slots = places[label]
        _note(panel, limit * 0.02, top + slots * _BAR / 2, "no figures")
    for entry in entries:
        top, slots = places[entry["label"]]
        top += (slots - len(entry["bars"])) / 2 * _BAR
        floor_us, bottom = entry["floor"][1], top + len(entry["bars"]) * _BAR
        panel.plot([floor_us] * 2, [top - 0.1, bottom + 0.1], color="black", lw=1.8, zorder=3)
        for index, (name, us, p10, p90, text) in enumerate(entry["bars"]):
            y = top + (index + 0.5) * _BAR
            if us is None:
                _note(panel, floor_us + limit * 0.02, y, f"{name}: {text}")
                continue
            length = min(us, limit)
            panel.barh(y, length, height=_BAR * 0.86, color=_colour(name))
            if us > limit:
                for place in (0.955, 0.975):  # two slanted gaps: the bar goes on
                    ends = [limit * (place - 0.008), limit * (place + 0.008)]
                    panel.plot(ends, [y + 0.5, y - 0.5], color="white", lw=2.5)
            else:
                panel.plot([p10, p90], [y, y], color="black", lw=0.9)
                length = max(us, p90)
            weight = "bold" if name == "jax_ep" else "normal"
            panel.text(length + limit * 0.02, y, text, va="center", fontsize=8, fontweight=weight)
    panel.set_xlim(0, limit * 1.28)
    panel.set_xlabel("us, median @SMs; line: 10th to 90th percentile", fontsize=8.5)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _limit(entries: list[dict[str, Any]]) -> float:
    """The longest bar with its spread, without bars of more than four times the median bar."""
    bars = [bar for entry in entries for bar in entry["bars"] if bar[1]]
    middle = sorted(bar[1] for bar in bars)[len(bars) // 2] if bars else 0
    floors = [entry["floor"][1] for entry in entries]
    return max([2 * us for us in floors] + [bar[3] for bar in bars if bar[1] <= 4 * middle])


def _note(panel: Any, x: float, y: float, text: str) -> None:
    panel.text(x, y, text, va="center", fontsize=8, fontstyle="italic", color="#555555")


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    handles.append(
        Line2D([], [], color="black", linewidth=1.8, label="floor: the bytes over the link")
    )
    figure.legend(handles=handles, ncols=len(handles), loc="lower left", frameon=False, fontsize=9)


def _colour(name: str) -> str:
    return next((colour for start, colour in _COLOURS.items() if name.startswith(start)), "#009E73")
