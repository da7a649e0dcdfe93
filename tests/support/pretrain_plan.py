"""Plans a small configuration of ``examples/pretrain`` for eight H200s, and prints JSON.

    python tests/support/pretrain_plan.py

"plan" is what the plan says, "table" how it is printed, and "moved" the shapes that XLA's collectives
of the compiled step give, by kind: the largest of each dtype, in elements.
"""

from __future__ import annotations

from examples.pretrain import h200

h200.prepare()

import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402

import rich.console  # noqa: E402

import pretrain_cases  # noqa: E402
from examples.pretrain import plan  # noqa: E402

OVERRIDES = (
    "model.dtype=bfloat16",
    "model.hidden=128",
    "model.moe_intermediate=128",
    "model.num_layers=2",
    "model.num_dense_layers=0",
    "model.rank_capacity_factor=1.5",
    "parallel.fsdp=2",
    "parallel.expert=4",
)


def moved(text: str) -> dict[str, dict[str, int]]:
    """The most elements that a collective of each kind gives, by dtype."""
    found: dict[str, dict[str, int]] = {}
    pattern = r" = (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        of_kind = found.setdefault(kind, {})
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", shapes):
            count = math.prod(int(size) for size in sizes.split(","))
            of_kind[dtype] = max(of_kind.get(dtype, 0), count)
    return found


if __name__ == "__main__":
    setup, compiled = plan.compile_step(pretrain_cases.small(*OVERRIDES), 1, 8)
    found = plan.describe(setup, compiled, 8, compile_s=0.0)
    console = rich.console.Console(width=200)
    with console.capture() as captured:
        console.print(plan.table([found]))
        console.print(plan.parts_table(found))
    said = {"plan": found.as_dict(), "table": captured.get(), "moved": moved(compiled.as_text())}
    print(json.dumps(said))
