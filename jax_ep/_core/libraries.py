"""Loads a native library and registers its FFI targets."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax

from jax_ep import _compat
from jax_ep._version import __version__

_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}


@functools.cache
def why_unavailable(backend: str = "cpu") -> str | None:
    """None once the native library of ``backend`` is loaded and registered, else why it is not."""
    try:
        library: Any = importlib.import_module(f"jax_ep._{backend}")
    except ImportError as error:
        return f"the native {backend} library did not load ({error}); reinstall jax_ep"
    built = library.build_info()["version"]
    if built != __version__:
        return (
            f"the native {backend} library is of version {built} and the package of {__version__}; "
            "reinstall jax_ep"
        )
    platform = _PLATFORMS[backend]
    jax.devices(backend)  # XLA's client must be up before targets with state are registered.
    if backend == "cpu":
        _compat.register_ffi_types(library.types(), platform=platform)
    for name, handlers in library.targets().items():
        jax.ffi.register_ffi_target(name, handlers, platform=platform)
    return None
