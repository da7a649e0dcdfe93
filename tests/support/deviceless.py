"""Compiles programs for H200s on machines without a GPU.

What compiles is XLA's compiler for GPUs, as far as schedules go: stream assignment, latency hiding,
asynchronous regions. Flags leave out what needs a GPU, the autotuning of matmuls. It takes the packages
jax-cuda13-plugin and jax-cuda13-pjrt in the version of JAX, but neither a driver nor CUDA's libraries.

The plugin starts with these flags and with a patch of JAX, so only a process of its own imports this
module (``gpu_schedules.py``).
"""

from __future__ import annotations

import functools
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 --xla_gpu_cublas_fallback=true"
)

import jax

_H200 = """
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


def gpu_devices(count: int, hosts: int = 1) -> list[Any]:
    """Compile-only H200s, as many on each host, one after the other."""
    from jax._src.lib import _jax

    _load_plugin()
    # The topology is slices x hosts x GPUs of each host.
    options = {"target_config": _H200, "topology": f"1x{hosts}x{count // hosts}"}
    topology: Any = _jax.get_default_c_api_topology("cuda", "", options)
    return topology._make_compile_only_devices()


@functools.cache
def _load_plugin() -> None:
    from jax._src import xla_bridge
    from jax._src.lib import xla_client

    bridge: Any = xla_bridge
    bridge.discover_pjrt_plugins()  # loads the plugin and registers its FFI extension ...
    bridge.discover_pjrt_plugins = lambda: None  # ... once
    xla_client.initialize_pjrt_plugin("cuda")
    canonical = bridge.canonicalize_platform
    bridge.canonicalize_platform = lambda p: "cuda" if p in ("gpu", "cuda") else canonical(p)


def lowered(function: Any, *arguments: Any) -> Any:
    """``function`` lowered for GPUs."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
