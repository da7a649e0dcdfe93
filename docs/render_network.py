"""Write the table of memory in docs/network.md: ``python docs/render_network.py [--check]``."""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

from jax_ep._groups.network import DEFAULTS, Settings
from jax_ep.doctor import memory

PAGE = pathlib.Path(__file__).with_name("network.md")
_HOSTS = (2, 8, 32, 64)
_RANKS_PER_HOST = 8
_MIB = 1 << 20
_BLOCK = re.compile(r"(<!-- memory: .*? -->\n).*?(<!-- end of memory -->)", re.DOTALL)


def table() -> str:
    """Bytes of a group with the default settings, whatever the environment says."""
    lines = [
        "| hosts | ranks | lanes | MiB of each GPU | groups in 2 GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for num_hosts in _HOSTS:
        settings = Settings.of(DEFAULTS, num_hosts)
        taken = memory.network_bytes(settings, num_hosts, _RANKS_PER_HOST)
        room = DEFAULTS["JAX_EP_NETWORK_BYTES"] // taken
        ranks = num_hosts * _RANKS_PER_HOST
        lines.append(
            f"| {num_hosts} | {ranks} | {settings.num_lanes} | {taken / _MIB:.1f} | {room} |"
        )
    return "\n".join(lines) + "\n"


def render(page: str) -> str:
    """The page with the table."""
    new, count = _BLOCK.subn(lambda block: f"{block[1]}\n{table()}\n{block[2]}", page)
    if count != 1:
        raise ValueError(f"network.md: expected one block of memory, got {count}.")
    return new


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    page = render(PAGE.read_text())
    if not options.check:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        print("docs/network.md is out of date: run python docs/render_network.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
