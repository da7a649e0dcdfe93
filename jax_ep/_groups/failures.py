"""Whether a group of GPUs has failed, as the native library knows it."""

from __future__ import annotations

import importlib


def failure(group_id: int) -> str | None:
    """The first failure of the group in this process as a text, or None."""
    return importlib.import_module("jax_ep._cuda").group_failure(group_id)
