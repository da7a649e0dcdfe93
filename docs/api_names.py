"""A Sphinx extension: the API pages document every public name, with signatures that say something.

The build warns, and with ``-W`` fails, about a public name that no page documents.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

# Modules whose public names users call. The others are reached through them.
MODULES = (
    "jax_ep",
    "jax_ep.nnx",
    "jax_ep.linen",
    "jax_ep.routing",
    "jax_ep.reference",
    "jax_ep.scale",
)
# Parameters to leave out: Flax gives the last two to every module of Linen, and documents them itself.
_HIDDEN = ("self", "parent", "name")


def public_names() -> Iterator[str]:
    """Full names of everything public: functions, classes, constants, and members with a text."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in _names_of(module):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType) or name == "__version__":
                continue
            yield f"{module_name}.{name}"
            if inspect.isclass(value):
                yield from (f"{module_name}.{name}.{member}" for member in _members(value))


def _names_of(module: types.ModuleType) -> list[str]:
    """Those of ``__all__``, else the functions and classes that the module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def _members(value: type) -> Iterator[str]:
    """Methods and properties of the class itself that have a text; ``setup`` is for Flax alone."""
    for name, member in vars(value).items():
        is_method = inspect.isfunction(member) and member.__module__ == value.__module__
        public = (not name.startswith("_") or name == "__call__") and name != "setup"
        if public and (is_method or isinstance(member, property)) and inspect.getdoc(member):
            yield name


class _Name:
    """Prints as a name, because functions and classes would print their addresses."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def signature(value: Any) -> str:
    """The parameters that users give, with defaults that are functions or classes by their names."""
    given = inspect.signature(value)
    if list(given.parameters) == ["args", "kwargs"]:  # a metaclass's call, which passes them on
        given = inspect.signature(value.__init__)
    parameters = []
    for parameter in given.parameters.values():
        if parameter.name in _HIDDEN:
            continue
        default = parameter.default
        if default is not parameter.empty and hasattr(default, "__name__"):
            default = _Name(default.__name__)
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    empty = inspect.Signature.empty
    return str(given.replace(parameters=parameters, return_annotation=empty))


def _process_signature(
    app: Any, what: str, name: str, value: Any, options: Any, given: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """What autodoc shows in place of its own signature."""
    if given is None:  # as of properties
        return None, None
    if (
        what in ("class", "exception") and given == "()"
    ):  # so a page says that jax_ep makes the object
        return "", None
    return signature(value), None


def missing(documented: Iterable[str]) -> list[str]:
    """Public names that are not among those that pages document."""
    return sorted(set(public_names()) - set(documented))


def _check(app: Any, env: Any) -> None:
    from sphinx.util import logging

    for name in missing(env.get_domain("py").objects):
        logging.getLogger(__name__).warning("no page of docs/api documents %s", name)


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
