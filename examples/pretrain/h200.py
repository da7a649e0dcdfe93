"""H200s that programs can be compiled for, on a machine without a GPU.

XLA's compiler for GPUs comes in the packages jax-cuda13-plugin and jax-cuda13-pjrt, in the version of
jaxlib. It needs neither a driver nor CUDA's libraries. ``prepare`` must run before JAX is imported, so
only a process of its own plans.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from typing import Any

PLUGIN = "jax-cuda13-plugin"

_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


class NoCompilerError(RuntimeError):
    """XLA's compiler for GPUs is not there; the text says what to install."""


def prepare() -> None:
    """Find the compiler, and set what JAX starts with.

    Raises:
        NoCompilerError: if the compiler is missing or of another version than jaxlib.
    """
    if folder := os.environ.get("JAX_EP_CUDA_PLUGIN"):
        sys.path.append(folder)
    wanted = importlib.metadata.version("jaxlib")
    versions = [d.version for d in importlib.metadata.distributions(name=PLUGIN)]
    if wanted not in versions:
        found = f"version {versions[0]}" if versions else "none"
        raise NoCompilerError(
            f"{PLUGIN}: expected version {wanted}, that of jaxlib, found {found}. A plan needs XLA's "
            f"compiler for GPUs, but no GPU:\n"
            f"  pip install --no-deps --target build/cuda_plugin {PLUGIN}=={wanted} "
            f"jax-cuda13-pjrt=={wanted}\n"
            f"  export JAX_EP_CUDA_PLUGIN=$PWD/build/cuda_plugin"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Autotuning would need a GPU.
    os.environ["XLA_FLAGS"] = (
        "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 "
        "--xla_gpu_cublas_fallback=true"
    )


def devices(hosts: int, per_host: int = 8) -> list[Any]:
    """Compile-only H200s, those of a host one after the other."""
    from jax._src.lib import _jax

    _load()
    # The topology is slices x hosts x GPUs of each host.
    options = {"target_config": _TARGET, "topology": f"1x{hosts}x{per_host}"}
    topology: Any = _jax.get_default_c_api_topology("cuda", "", options)
    return topology._make_compile_only_devices()


@functools.cache
def _load() -> None:
    from jax._src import xla_bridge
    from jax._src.lib import xla_client

    bridge: Any = xla_bridge
    bridge.discover_pjrt_plugins()  # loads the plugin and registers its FFI extension ...
    bridge.discover_pjrt_plugins = lambda: None  # ... once
    xla_client.initialize_pjrt_plugin("cuda")
    canonical = bridge.canonicalize_platform
    bridge.canonicalize_platform = lambda p: "cuda" if p in ("gpu", "cuda") else canonical(p)
