"""How the GPUs of this host are linked, read from the tables that nvidia-smi prints for people.

GPUs are numbered as nvidia-smi does, whatever CUDA_VISIBLE_DEVICES says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Pair = tuple[int, int]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"GPU(\d+)")
_LINK = re.compile(r"NV\d+|PIX|PXB|PHB|NODE|SYS")
_ACCESS = re.compile(r"(?!X$)[A-Z]+")
_MEANINGS = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe through several bridges of a CPU",
    "SYS": "PCIe and the link between CPUs",
}


def links(text: str) -> dict[Pair, str] | None:
    """What joins each pair of GPUs ("NV18", "PIX" ...), or None if the text does not tell.

    Args:
        text: What ``nvidia-smi topo -m`` printed.
    """
    table = _table(text, _LINK)
    return table and {(a, b): link for (a, b), link in table.items() if a < b}


def access(text: str) -> dict[Pair, str] | None:
    """Whether the first GPU reads the second one's memory: "OK", or why not; None if not told.

    Args:
        text: What ``nvidia-smi topo -p2p r`` printed.
    """
    return _table(text, _ACCESS)


def is_nvlink(link: str) -> bool:
    """Whether a link is NVLink, through switches or not."""
    return link.startswith("NV")


def meaning(link: str) -> str:
    """What a link is, for people."""
    return "NVLink" if is_nvlink(link) else _MEANINGS[link]


def pairs_text(pairs: Iterable[Pair]) -> str:
    """Pairs of GPUs, for people."""
    return ", ".join(f"GPU{a}-GPU{b}" for a, b in sorted(pairs))


def _table(text: str, cell: re.Pattern[str]) -> dict[Pair, str] | None:
    """The cells between different GPUs; None unless all of them are there and match ``cell``."""
    gpus: list[int] = []
    cells: dict[Pair, str] = {}
    for line in _COLOURS.sub("", text).splitlines():
        words = line.split()
        numbers = []
        for word in words:  # other columns (NICs, affinities) follow those of the GPUs
            match = _GPU.fullmatch(word)
            if match is None:
                break
            numbers.append(int(match[1]))
        if len(numbers) > 1 and not gpus:
            gpus = numbers
        elif len(numbers) == 1 and numbers[0] in gpus:
            row = words[1 : 1 + len(gpus)]
            cells |= {(numbers[0], gpu): found for gpu, found in zip(gpus, row, strict=False)}
    wanted = [(a, b) for a in gpus for b in gpus if a != b]
    if not wanted or not all(cell.fullmatch(cells.get(pair, "")) for pair in wanted):
        return None
    return {pair: cells[pair] for pair in wanted}
