"""Files of text in a folder."""

from __future__ import annotations

import pathlib

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "node_modules",
    "site-packages",
    "test",
    "tests",
}


def text_files(root: pathlib.Path, pattern: str) -> list[tuple[str, pathlib.Path]]:
    """Name (relative, with slashes) and path of every file, by name."""
    if root.is_file():
        return [(root.name, root)]
    found = []
    for file in root.rglob(pattern):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and not _SKIPPED_FOLDERS & set(parts[:-1]):
            found.append(("/".join(parts), file))
    return sorted(found)


def is_text(content: bytes) -> bool:
    """Whether it is UTF-8 text, and not empty."""
    if not content or b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
