"""Memory that an op takes beyond its arguments and results."""

from __future__ import annotations

import math
import re

# The number of results of each FFI target that the op gives; those after them are scratch memory.
_RESULTS = {
    "jax_ep_plan": 10,
    "jax_ep_dispatch": 3,
    "jax_ep_plan_dispatch": 13,
    "jax_ep_combine": 2,
    "jax_ep_combine_vjp": 2,
    "jax_ep_network_plan": 11,
    "jax_ep_network_dispatch": 3,
    "jax_ep_network_combine": 2,
    "jax_ep_network_combine_vjp": 2,
}
_BITS = {"pred": 8, "bf16": 16}  # the names of other types end in their bits


def scratch_bytes(compiled_text: str) -> int:
    """Bytes of the scratch results of one call of each of our targets in a compiled module."""
    largest: dict[str, int] = {}
    for line in compiled_text.splitlines():
        target = re.search(r'custom_call_target="(jax_ep_\w+)"', line)
        results = re.search(r"= \((.*?)\) custom-call\(", line)
        if not target or not results or target[1] not in _RESULTS:
            continue
        scratch = _shapes(results[1])[_RESULTS[target[1]] :]
        largest[target[1]] = max(largest.get(target[1], 0), sum(map(_bytes, scratch)))
    return sum(largest.values())


def _shapes(text: str) -> list[tuple[str, str]]:
    """(type, dimensions) of each array of a tuple, such as ("f32", "16,8")."""
    return re.findall(r"(\w+)\[([\d,]*)\]", text)


def _bytes(shape: tuple[str, str]) -> int:
    kind, dimensions = shape
    width = re.match(r"[a-z]+(\d+)", kind)
    bits = _BITS.get(kind) or int(width[1] if width else 8)
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
