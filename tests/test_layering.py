"""The dependency rule of ARCHITECTURE.md: imports point downwards, without a circle."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

import jax_ep

ROOT = pathlib.Path(jax_ep.__file__).parent
# From the bottom up. Modules of one row do not import each other.
ROWS = (
    ("_version", "_compat", "_environment", "_errors"),
    ("_core",),
    ("_groups", "_grouped_dot", "routing"),
    ("reference", "_backends"),
    ("_ops",),
    ("_moe",),
    ("nnx", "linen", "__init__"),
    ("doctor", "bench", "scale"),
    ("tune",),
)
MOST_LEVELS = 12
MOST_AT_THE_TOP = 20


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def imports_of(module: str, *, when_loaded: bool = False) -> frozenset[str]:
    """The package's modules that a module imports anywhere, or (``when_loaded``) while it loads."""
    found = set()
    tree = ast.parse(MODULES[module].read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} - {"", module}
    return frozenset(found)


def row_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    (row,) = [number for number, row in enumerate(ROWS) if part in row]
    return row


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_part_has_its_row():
    parts = {part_of(module) for module in MODULES}
    assert parts == {part for row in ROWS for part in row}
    assert len(parts) <= MOST_AT_THE_TOP


def test_imports_point_downwards():
    upwards = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports_of(module)
        # The index may be imported by name. It loads Flax's layers when they are asked for.
        if other != "jax_ep"
        and module != "jax_ep"
        and part_of(module) != part_of(other)
        and row_of(other) >= row_of(module)
    ]
    assert not upwards


@pytest.mark.parametrize("when_loaded", [False, True], ids=["anywhere", "when loaded"])
def test_no_circle_and_few_levels(when_loaded):
    """There is no circle, even with imports inside functions or only for type checkers."""
    done: dict[str, int] = {}

    def level(module: str, way: tuple[str, ...] = ()) -> int:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in done:
            others = imports_of(module, when_loaded=when_loaded) - {"jax_ep"}
            done[module] = 1 + max((level(m, (*way, module)) for m in others), default=0)
        return done[module]

    levels = max(map(level, MODULES))
    assert levels <= MOST_LEVELS or not when_loaded


def test_wings_say_what_lives_there():
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), (
                f"{module} does not say what it is"
            )


def test_files_are_short():
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= 400, path
