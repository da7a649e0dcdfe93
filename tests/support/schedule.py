"""Reads the schedule of a compiled program, in XLA's text of it."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction of a compiled program.

    Attributes:
        name: Its name, without the "%".
        kind: Its opcode; for a custom call, the target.
        operands: Names of what it is given.
        region: What an asynchronous call runs: the target of the custom call in it, else "".
        text: What stands behind its opcode.
    """

    name: str
    kind: str
    operands: tuple[str, ...]
    region: str
    text: str


def schedule(text: str) -> list[Op]:
    """The instructions of the entry computation, in the order in which they are issued."""
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))

    def target_in(computation: str) -> str:
        body = computations.get(computation, "")
        found = re.search(r'custom_call_target="([^"]*)"', body)
        if found:
            return found[1]
        inner = re.search(r"(?:to_apply|calls)=%([\w.-]+)", body)
        return target_in(inner[1]) if inner else ""

    entry = re.search(r"^ENTRY .*?\{\n(.*?)^\}", text, re.M | re.S)
    assert entry is not None
    ops = []
    for line in entry[1].splitlines():
        found = re.match(r"\s*(?:ROOT )?%(\S+) = .*?[\]\})] ([a-z][a-z\-]*)\((.*)", line)
        if found is None:
            continue
        name, opcode, rest = found.groups()
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        called = re.search(r"(?:to_apply|calls)=%([\w.-]+)", rest)
        operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
        is_call = opcode in ("call-start", "async-start")
        region = target_in(called[1]) if is_call and called else ""
        kind = target[1] if target else opcode
        ops.append(Op(name, kind, tuple(operands), region, rest))
    return ops


def chained(text: str, target: str) -> bool:
    """Whether one of the two calls of ``target`` in a compiled program waits for the other.

    A call in flight counts by the instruction that starts it.
    """
    ops = schedule(text)
    operands = {op.name: op.operands for op in ops}
    targets = (target, f"{target}_async")
    first, second = (op.name for op in ops if op.kind in targets or op.region in targets)

    def needs(name: str, wanted: str) -> bool:
        return any(o == wanted or needs(o, wanted) for o in operands.get(name, ()))

    return needs(first, second) or needs(second, first)
