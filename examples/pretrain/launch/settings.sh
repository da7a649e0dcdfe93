# shellcheck shell=bash
# What every process of a run has in its environment; README.md explains each line. A value that is
# set already stays. one_host.sh and slurm/task.sh read this file.

# Memory: XLA's share of a GPU. The rest is for NVSHMEM, NCCL and CUDA.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.88}"

# XLA: collectives of FSDP beside computation, and in pieces that are worth a collective.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
XLA_FLAGS="$XLA_FLAGS --xla_gpu_all_gather_combine_threshold_bytes=268435456"
XLA_FLAGS="$XLA_FLAGS --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456"
if [[ "${PRETRAIN_DETERMINISTIC:-0}" == 1 ]]; then
  XLA_FLAGS="$XLA_FLAGS --xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"
fi
export XLA_FLAGS

# Programs compiled once serve all later starts.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/jax_cache_$(id -u)}"

# NVLink multicast: jax_ep does not use it, and it takes memory of every GPU.
export NVSHMEM_DISABLE_NVLS="${NVSHMEM_DISABLE_NVLS:-1}"

# The interface over which processes find each other; needed where a host has several.
if [[ -n "${PRETRAIN_INTERFACE:-}" ]]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$PRETRAIN_INTERFACE}"
  export NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME="${NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME:-$PRETRAIN_INTERFACE}"
fi
