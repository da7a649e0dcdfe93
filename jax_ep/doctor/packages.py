"""Packages and the driver: what is installed, whether it fits together, and what to type if not."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping

from jax_ep._compat import OLDEST_JAX
from jax_ep.doctor.finding import Finding, ask_nvidia_smi

_NEEDED = ("jax", "jaxlib", "numpy")
# Others: what they are for, and the extra of jax_ep that brings them.
_OPTIONAL = {
    "flax": ("jax_ep.nnx and jax_ep.linen", "flax"),
    "jax-cuda13-plugin": ("NVIDIA GPUs", "cuda13"),
    "nvidia-nvshmem-cu13": ("groups of GPUs that span hosts", "cuda13"),
    "typer": ("python -m jax_ep.bench and python -m jax_ep.tune", "bench"),
}
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")  # JAX uses them in the version of jaxlib only
_PLUGIN_OF_CUDA_12 = "jax-cuda12-plugin"
_OLDEST_DRIVER = 580  # that of CUDA 13.0


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Each package that jax_ep needs or can use."""
    for package in (*_NEEDED, *_OPTIONAL):
        version = installed(package)
        if version is not None:
            yield Finding("ok", package, version)
        elif package in _NEEDED:
            yield Finding("fail", package, "not installed", f"pip install {package}")
        else:
            purpose, extra = _OPTIONAL[package]
            mend = f"needed for {purpose} only: pip install 'jax-ep[{extra}]'"
            yield Finding("note", package, "not installed", mend)


def compatibility() -> Iterator[Finding]:
    """Whether the versions of JAX's packages fit jax_ep and each other."""
    oldest = ".".join(map(str, OLDEST_JAX))
    for package in ("jax", "jaxlib"):
        version = installed(package)
        if version is not None and _numbers(version) < OLDEST_JAX:
            detail = f"{version} is older than {oldest}"
            yield Finding(
                "fail", package, detail, f"pip install 'jax>={oldest}' 'jaxlib>={oldest}'"
            )
    jaxlib = installed("jaxlib")
    for package in _PLUGINS:
        version = installed(package)
        if version is not None and jaxlib is not None and _numbers(version) != _numbers(jaxlib):
            yield Finding(
                "fail",
                package,
                f"{version} is not the version of jaxlib, {jaxlib}, so JAX does not use GPUs",
                f"pip install 'jax[cuda13]=={jaxlib}'",
            )
    if installed(_PLUGIN_OF_CUDA_12) is not None and installed(_PLUGINS[0]) is None:
        yield Finding(
            "note",
            _PLUGIN_OF_CUDA_12,
            "it is for CUDA 12, and jax_ep for CUDA 13",
            f"pip uninstall {_PLUGIN_OF_CUDA_12} jax-cuda12-pjrt && pip install 'jax-ep[cuda13]'",
        )


def gpus_in_use(platform: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether JAX, whose devices are of ``platform``, uses the GPUs that the driver lists."""
    listing = ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    drivers = sorted(set(listing.split()))
    if not drivers:
        return
    uses_gpus = platform == "gpu"
    for driver in drivers:
        major = driver.partition(".")[0]
        if major.isdecimal() and int(major) < _OLDEST_DRIVER:
            yield Finding(
                "note" if uses_gpus else "fail",
                "NVIDIA driver",
                f"{driver} is older than {_OLDEST_DRIVER}, which CUDA 13 needs without its package "
                "for forward compatibility",
                f"on Ubuntu: sudo apt-get install nvidia-driver-{_OLDEST_DRIVER}-server && sudo "
                "reboot; elsewhere install that driver or a later one",
            )
            if not uses_gpus:
                return
    if uses_gpus:
        yield Finding("ok", "NVIDIA driver", ", ".join(drivers))
    elif environ.get("JAX_PLATFORMS"):
        detail = f"JAX does not use them, as JAX_PLATFORMS={environ['JAX_PLATFORMS']}"
        yield Finding("note", "GPUs of JAX", detail, "unset JAX_PLATFORMS to use them")
    elif installed(_PLUGINS[0]) is None:
        detail = f"none: {_PLUGINS[0]} is not installed"
        yield Finding("fail", "GPUs of JAX", detail, "pip install 'jax-ep[cuda13]'")
    else:
        yield Finding(
            "fail",
            "GPUs of JAX",
            f"none, although {_PLUGINS[0]} is installed and the driver is {', '.join(drivers)}",
            "JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' says why; to install its "
            "packages again: pip install --force-reinstall 'jax-ep[cuda13]'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The dotted numbers that a version begins with."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
