"""Loads a native library and registers its FFI targets."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jaxlib

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
    try:
        if backend == "cpu":
            _compat.register_ffi_types(library.types(), platform=platform)
        for name, handlers in library.targets().items():
            jax.ffi.register_ffi_target(name, handlers, platform=platform)
    except jax.errors.JaxRuntimeError as error:
        # XLA takes handlers that were built with headers as old as its own, or older.
        major, minor = library.build_info()["ffi_api_version"]
        return (
            f"jaxlib {jaxlib.__version__} refuses the native {backend} library, which was built for "
            f"version {major}.{minor} of XLA's FFI ({error}); build jax_ep with the headers of this "
            "jaxlib or of an older one"
        )
    return None
