"""Write docs/api.md from the docstrings: ``python docs/render_api.py [--check]``."""

from __future__ import annotations

import argparse
import inspect
import pathlib
import re
import sys
import types

PAGE = pathlib.Path(__file__).with_name("api.md")
HEADER = """\
# API

Written by `python docs/render_api.py` from the docstrings; change them there. Shapes are those that
one rank sees inside `jax.shard_map`: T tokens, H hidden, K top-k, E experts, R ranks of the group,
L = E / R local experts, C capacity.
"""
SECTIONS = {
    "Groups": ["create_group", "Group"],
    "Dispatch and combine": ["dispatch", "combine", "Dispatched", "Handle", "DispatchConfig"],
    "In two halves": [
        "dispatch_start",
        "dispatch_done",
        "combine_start",
        "combine_done",
        "Ticket",
    ],
    "8-bit rows": ["quantize", "dequantize", "Quantized"],
    "Layers": [
        "moe",
        "MoEParams",
        "MoEAux",
        "SharedExpert",
        "PartitionNames",
        "init_moe_params",
        "moe_partition_specs",
        "grouped_dot",
        "nnx.MoE",
        "nnx.RouterBias",
        "linen.MoE",
    ],
    "Scale": [
        "scale.predict",
        "scale.Workload",
        "scale.Machine",
        "scale.Prediction",
        "scale.OpCost",
        "scale.LayerTimes",
        "scale.MemoryUse",
    ],
    "Errors": ["CommunicationError", "errors"],
}
MODULES = ["routing", "reference"]


def render() -> str:
    """The whole page."""
    import jax_ep
    import jax_ep.scale  # not part of the index: loaded on request

    listed = {name for names in SECTIONS.values() for name in names} | set(MODULES)
    missing = set(jax_ep.__all__) - listed - {"__version__", "linen", "nnx"}
    if missing:
        raise SystemExit(f"docs/render_api.py: no section lists {sorted(missing)}")
    parts = [HEADER]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            value: object = jax_ep
            for part in name.split("."):
                value = getattr(value, part)
            parts.append(_entry(f"jax_ep.{name}", value))
    for name in MODULES:
        module = getattr(jax_ep, name)
        parts.append(f"## `jax_ep.{name}`\n\n{_text(module)}\n")
        parts.extend(_entry(f"jax_ep.{name}.{n}", v) for n, v in _public_members(module))
    return "\n".join(parts)


def _public_members(module: types.ModuleType) -> list[tuple[str, object]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def _entry(name: str, value: object) -> str:
    signature = ""
    if inspect.isfunction(value):
        bare = inspect.signature(value).replace(return_annotation=inspect.Signature.empty)
        plain = [_plain(parameter) for parameter in bare.parameters.values()]
        signature = str(bare.replace(parameters=plain))
    return f"### `{name}{signature}`\n\n{_text(value)}\n"


class _Name:
    """Prints as a name: functions and classes print as their addresses."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if default is not parameter.empty and hasattr(default, "__name__"):
        default = _Name(default.__name__)
    return parameter.replace(annotation=parameter.empty, default=default)


def _text(value: object) -> str:
    """The docstring as Markdown: sections become bold titles, their entries bullets."""
    lines: list[str] = []
    in_section = in_code = has_entries = False
    for line in (inspect.getdoc(value) or "").splitlines():
        if in_code and line.strip() and not line.startswith("    "):
            while not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            in_code = False
        if in_code:
            if line.strip() or lines[-1] != "```":
                lines.append(line[4:])
            continue
        section = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        entry = re.match(r"    (\*{0,2}\w[\w, *]*):\s*(.*)", line) if has_entries else None
        if section:
            in_section = True
            has_entries = section[1] in ("Args", "Attributes", "Raises")
            lines.append(f"**{section[1]}**\n")
        elif line.endswith("::"):
            in_code, in_section, has_entries = True, False, False
            lines += [line[:-1], "", "```"]
        elif entry:
            lines.append(f"* `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and (not line or line.startswith(" "))
            has_entries = has_entries and in_section
            lines.append(line.strip() if in_section else line)
    if in_code:
        lines.append("```")
    return re.sub(r"``([^`\n]+)``", r"`\1`", "\n".join(lines))


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    page = render()
    if not options.check:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        print("docs/api.md is out of date: run python docs/render_api.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
