"""Turns CUDA C++ into C++ that the emulator's headers compile: rewrite.py FROM TO

It changes copies where macros do not suffice: launches, variables in shared memory, the choice of a
mutation. Lines keep their numbers.
"""

import pathlib
import re
import sys

_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\((\d+)\)\s+)?([\w:]+)\s+(\w+)\[\]\s*;")
_STATIC = re.compile(r"__shared__\s+([\w:]+)\s+(\w+)\s*;")


def _launched(code: str, end: int) -> int:
    """Where the name of a kernel, with its template arguments, begins; it ends before `end`."""
    i = end
    while code[i - 1].isspace():
        i -= 1
    if code[i - 1] == ">":
        depth = 0
        while True:
            i -= 1
            depth += {">": 1, "<": -1}.get(code[i], 0)
            if depth == 0:
                break
    while code[i - 1].isalnum() or code[i - 1] in "_:":
        i -= 1
    return i


def _rewrite_launches(code: str) -> str:
    while (at := code.find("<<<")) >= 0:
        end = code.index(">>>", at)
        begin = _launched(code, at)
        kernel, arguments = code[begin:at], code[at + 3 : end]
        code = f"{code[:begin]}emulator::Launch({kernel}, {arguments}){code[end + 3 :]}"
    return code


def rewrite(code: str, name: str) -> str:
    def static(match: re.Match[str]) -> str:
        kind, variable = match.groups()
        return (
            f"{kind}& {variable} = *static_cast<{kind}*>(emulator::StaticShared([] {{ static const "
            f"size_t at = emulator::ReserveShared(sizeof({kind}), alignof({kind})); return at; "
            "}()));"
        )

    code = _DYNAMIC.sub(
        lambda m: (
            f"{m[2]}* const {m[3]} = static_cast<{m[2]}*>(emulator::DynamicShared({m[1] or 16}));"
        ),
        code,
    )
    code = _STATIC.sub(static, code)
    if "__shared__ " in code:
        raise ValueError(f"{name}: a variable in shared memory that this script does not know")
    # The program chooses when it runs which wait to take out, so one build serves all mutations. It
    # chooses the length of the ring in the same way.
    code = code.replace(
        "constexpr int kMutation = 0;", "inline const int kMutation = emulator::Mutation();"
    )
    code = code.replace(
        "constexpr int kMostRingSlots = 1 << 30;",
        "inline const int kMostRingSlots = emulator::MostRingSlots();",
    )
    # Standard headers use the name of this macro of CUDA.
    code = code.replace("__noinline__", "__attribute__((noinline))")
    return f'#line 1 "{name}"\n{_rewrite_launches(code)}'


def main() -> None:
    source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            (target / path.name).write_text(rewrite(path.read_text(), str(path)))


if __name__ == "__main__":
    main()
