"""The folder of a run: whether it can be written to, and whether its run is the same one."""

from __future__ import annotations

import os
import pathlib
from typing import Any


def make_folder(folder: pathlib.Path) -> None:
    """Make ``folder``; an error names the option of the command line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out: expected a folder that can be made, got {folder.parent}: {error.strerror}."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"--out: expected a folder that can be written to, got {folder.parent}; take another."
        )


def differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The differences between two settings, as texts to print."""
    found = []
    for part, value in given.items():
        before = saved.get(part)
        if isinstance(value, dict) and isinstance(before, dict):
            names = [name for name in value if value[name] != before.get(name)]
            found += [f"{name} was {before.get(name)}, is {value[name]}" for name in names]
        elif value != before:
            found.append(f"{part} is another")
    return found
