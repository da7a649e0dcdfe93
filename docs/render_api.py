"""Write docs/api.md from the docstrings: ``python docs/render_api.py [--check]``."""

from __future__ import annotations

import argparse
import inspect
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

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
    "8-bit rows": ["quantize", "dequantize", "Quantized", "pack_scales"],
    "Layers": [
        "moe",
        "MoEParams",
        "MoEAux",
        "SharedExpert",
        "PartitionNames",
        "init_moe_params",
        "moe_partition_specs",
        "GatedActivation",
        "clamped_swiglu",
        "ExpertFunction",
        "grouped_dot",
        "grouped_mlp",
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
# Classes that users make themselves; jax_ep makes the others.
CONSTRUCTED = {
    "DispatchConfig",
    "GatedActivation",
    "MoEParams",
    "PartitionNames",
    "Quantized",
    "SharedExpert",
    "linen.MoE",
    "nnx.MoE",
}
# Variables that users may set, in the shell: when it counts, and what it does.
ENVIRONMENT = {
    "JAX_EP_STAGING_BYTES": (
        "run",
        "Bytes of memory on each GPU into which operands are copied where a group spans processes and "
        "its peers cannot read XLA's memory in place; 1 GiB by default. `python -m jax_ep.doctor` "
        "says whether they can. Set it to the same number in all processes.",
    ),
    "JAX_EP_TUNING_CACHE": (
        "run",
        "The file that `python -m jax_ep.tune` writes and `create_group` reads; "
        "`$XDG_CACHE_HOME/jax_ep/tuning.json` by default, or `~/.cache/jax_ep/tuning.json`.",
    ),
    "JAX_EP_NETWORK_BYTES": (
        "run",
        "Bytes of memory on each GPU for all groups that span hosts; 2 GiB by default. "
        "[network.md](network.md) says what a group takes. All processes need the same values of this "
        "and the next three.",
    ),
    "JAX_EP_NETWORK_CHUNK_BYTES": (
        "run",
        "Bytes of the chunks in which rows travel between hosts, a multiple of 1024 and at least 8192; "
        "256 KiB by default. A row may have 1024 bytes less at most.",
    ),
    "JAX_EP_NETWORK_LANES": (
        "run",
        "Lanes between two ranks of different hosts, each with chunks of its own; 0, the default, "
        "takes 64 divided by the number of other hosts, or one.",
    ),
    "JAX_EP_NETWORK_CHOICES": (
        "run",
        "Tokens times top-k that a plan between hosts has room for; 131072 by default.",
    ),
    "JAX_EP_CUDA": (
        "build",
        "`AUTO` (the default) builds the GPU library where there is nvcc of CUDA 12.3 or later, `OFF` "
        "leaves it out, and `ON` makes a missing or older nvcc an error.",
    ),
    "JAX_EP_NVSHMEM": (
        "build",
        "`AUTO` (the default) builds the library of groups that span hosts where the GPU library is "
        "built, nvcc is 13.0 or later and NVSHMEM is found, in `$NVSHMEM_HOME` or in the package "
        "`nvidia.nvshmem` of the Python that builds. `OFF` leaves it out, and `ON` makes it an error "
        "if something is missing.",
    ),
    "JAX_EP_PYTHON": (
        "build",
        "The Python interpreter that Bazel builds for and runs the tests with; `python3` by default.",
    ),
}


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
            parts.append(_entry(f"jax_ep.{name}", value, constructed=name in CONSTRUCTED))
            parts.extend(_members(f"jax_ep.{name}", value))
    parts.append(_environment())
    for name in MODULES:
        module = getattr(jax_ep, name)
        parts.append(f"## `jax_ep.{name}`\n\n{_text(module)}\n")
        parts.extend(_entry(f"jax_ep.{name}.{n}", v) for n, v in _public_members(module))
    return "\n".join(parts)


def _public_members(module: types.ModuleType) -> list[tuple[str, object]]:
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def _members(name: str, value: object) -> Iterator[str]:
    """An entry for each public method and property that the text of a class does not describe."""
    if not inspect.isclass(value):
        return
    described = re.findall(r"^    (\w+):", inspect.getdoc(value) or "", re.MULTILINE)
    for member, thing in vars(value).items():
        called = member == "__call__"
        is_method = inspect.isfunction(thing) and thing.__module__ == value.__module__
        if (member.startswith("_") and not called) or member in ("setup", *described):
            continue
        if inspect.getdoc(thing) and (is_method or isinstance(thing, property)):
            yield _entry(f"{name}.{member}", thing, level=4)


def _environment() -> str:
    """The table of variables."""
    rows = [f"| `{name}` | {when} | {what} |" for name, (when, what) in ENVIRONMENT.items()]
    head = (
        "## Environment variables\n\n"
        "A variable of the run is read by the process that uses jax_ep, and one of the build by pip or "
        "Bazel.\n\n| variable | of the | meaning |\n| --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


def _entry(name: str, value: Any, *, constructed: bool = False, level: int = 3) -> str:
    signature = ""
    if inspect.isfunction(value) or constructed:
        given = inspect.signature(value)
        if list(given.parameters) == ["args", "kwargs"]:  # a metaclass's call, which passes them on
            given = inspect.signature(value.__init__)
        bare = given.replace(return_annotation=inspect.Signature.empty)
        plain = [_plain(parameter) for parameter in bare.parameters.values()]
        if level == 4 or constructed:
            plain = [parameter for parameter in plain if parameter.name not in _HIDDEN]
        signature = str(bare.replace(parameters=plain))
    return f"{'#' * level} `{name}{signature}`\n\n{_text(value)}\n"


# Methods to leave out, and fields that every module of Flax Linen has, which Flax documents itself.
_HIDDEN = ("self", "parent", "name")


class _Name:
    """Prints as a name, because functions and classes would print their addresses."""

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
