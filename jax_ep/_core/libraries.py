"""Loads a native library and registers its FFI targets."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import pathlib
from typing import Any

import jax
import jaxlib

from jax_ep import _compat
from jax_ep._version import __version__

_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA", "nvshmem": "CUDA"}
_NVSHMEM = "libnvshmem_host.so.3"


@functools.cache
def why_unavailable(backend: str = "cpu", *, compile_only: bool = False) -> str | None:
    """None once the native library of ``backend`` is loaded and registered, else why it is not.

    Args:
        backend: "cpu", "cuda" or "nvshmem".
        compile_only: Whether it is for devices that exist in a topology only, so that JAX has none to
            start.
    """
    if backend == "nvshmem":
        obstacle = why_unavailable("cuda", compile_only=compile_only) or _load_nvshmem()
        if obstacle is not None:
            return obstacle
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
    if backend == "nvshmem":
        obstacle = library.version_obstacle(
            library.build_info()["nvshmem"], library.loaded_version()
        )
        groups: Any = importlib.import_module("jax_ep._cuda")
        obstacle = obstacle or library.use_registry(groups.registry())
        if obstacle is not None:
            return obstacle
    platform = _PLATFORMS[backend]
    # XLA's client must be up before targets with state are registered.
    if not compile_only:
        jax.devices("cpu" if backend == "cpu" else "cuda")
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


def nvshmem_folder() -> pathlib.Path | None:
    """Where the wheel nvidia-nvshmem-cu13 is installed, or None."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return pathlib.Path(places[0]) if places else None


def _load_nvshmem() -> str | None:
    """Load NVSHMEM for all libraries of the process; None, or why that failed."""
    if importlib.util.find_spec("jax_ep._nvshmem") is None:
        return (
            "jax_ep was built without NVSHMEM; pip install nvidia-nvshmem-cu13, then build jax_ep with "
            "pip install --no-build-isolation, or with NVSHMEM_HOME set"
        )
    folder = nvshmem_folder()
    path = _NVSHMEM if folder is None else str(folder / "lib" / _NVSHMEM)
    try:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"NVSHMEM did not load ({error}); pip install 'jax-ep[cuda13]'"
    return None
