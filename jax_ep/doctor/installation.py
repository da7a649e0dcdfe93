"""The installation: versions, libraries, devices, links, and whether the ops work on this machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Literal

from jax_ep.doctor import finding, network, packages, transport
from jax_ep.doctor.finding import Finding, ask_nvidia_smi

OLDEST_NVCC = "12.3"
CUDA_NEEDED = f"nvcc of CUDA {OLDEST_NVCC} or later to build, JAX for CUDA 13 to run"


def findings() -> Iterator[Finding]:
    """Look at everything, one finding at a time."""
    yield from finding.of(
        _versions,
        packages.compatibility,
        _native_library,
        _devices,
        _cpu_client,
        _gpus,
        _gpus_of_jax,
        _nvshmem,
        _links,
        _reach,
        _sharing,
        _xla_flags,
        _transport,
        _round_trip,
    )


def _versions() -> Iterator[Finding]:
    from jax_ep import __version__

    yield Finding("ok", "jax_ep", __version__)
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield from packages.versions()


def _native_library() -> Iterator[Finding]:
    if importlib.util.find_spec("jax_ep._cpu") is None:
        yield Finding(
            "fail",
            "native CPU library",
            "not here; the pure-JAX reference serves instead",
            "pip install -e . in the checkout (needs g++): there, Python finds the sources before "
            "an installed package",
        )
        return
    from jax_ep import _cpu
    from jax_ep._core import libraries

    reason = libraries.why_unavailable()
    if reason is not None:
        yield Finding("fail", "native CPU library", reason, "reinstall jax_ep")
        return
    yield Finding("ok", "native CPU library", _describe(_cpu.build_info()))
    yield Finding("ok", "FFI targets", ", ".join(sorted(_cpu.targets())))


def _describe(build_info: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in build_info.items())


def _devices() -> Iterator[Finding]:
    import jax

    devices = jax.devices()
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    text = f"{len(devices)} in {jax.process_count()} process(es): {', '.join(kinds)}"
    yield Finding("ok", "devices", text)
    if devices[0].platform == "cpu" and len(devices) == 1:
        yield Finding(
            "note",
            "devices",
            "one CPU device: groups have one rank",
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 gives eight",
        )


def _cpu_client() -> Iterator[Finding]:
    import jax

    num_threads = int(os.environ.get("PJRT_NPROC", "0"))
    num_devices = len(jax.devices("cpu"))
    if num_threads < 4 * num_devices:
        yield Finding(
            "fail",
            "CPU client threads",
            f"PJRT_NPROC={num_threads} for {num_devices} CPU devices: steps in flight can deadlock",
            "unset PJRT_NPROC, or set it to at least four times the number of devices",
        )
    else:
        yield Finding("ok", "CPU client threads", f"PJRT_NPROC={num_threads}")


def _gpus() -> Iterator[Finding]:
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        yield Finding("note", "NVIDIA GPUs", "none found (there is no nvidia-smi)")
        return
    query = [
        nvidia_smi,
        "--query-gpu=index,name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if listing.returncode:
        yield Finding(
            "note",
            "NVIDIA GPUs",
            listing.stdout.strip() or listing.stderr.strip(),
            "nvidia-smi does not reach the driver: sudo modprobe nvidia, or after an update of the "
            "driver sudo reboot",
        )
        return
    for line in listing.stdout.strip().splitlines():
        yield Finding("ok", "NVIDIA GPU", line)
    if importlib.util.find_spec("jax_ep._cuda") is None:
        yield Finding(
            "fail",
            "native GPU library",
            "not built; groups of GPUs use the pure-JAX reference over XLA's collectives",
            f"install again with nvcc on the PATH (JAX_EP_CUDA=ON insists); GPUs need {CUDA_NEEDED}",
        )
        return
    cuda = importlib.import_module("jax_ep._cuda")
    yield Finding("ok", "native GPU library", _describe(cuda.build_info()))


def _gpus_of_jax() -> Iterator[Finding]:
    """Whether JAX uses the GPUs of this machine."""
    import jax

    yield from packages.gpus_in_use(jax.devices()[0].platform)


def _nvshmem() -> Iterator[Finding]:
    """Whether the NVSHMEM that is installed fits; without GPUs nobody needs one."""
    if packages.installed("nvidia-nvshmem-cu13") is not None:
        yield from network.library(has_gpu=bool(ask_nvidia_smi("-L")))


def _links() -> Iterator[Finding]:
    """The links between the GPUs of this machine, and which of them read each other's memory."""
    from jax_ep._groups import links as gpu_links

    gpus = [line for line in ask_nvidia_smi("-L").splitlines() if line.startswith("GPU ")]
    if len(gpus) < 2:
        return
    links = gpu_links.links(ask_nvidia_smi("topo", "-m"))
    if links is None:
        yield Finding(
            "note",
            "GPU links",
            "cannot be told: nvidia-smi topo -m printed no table that is understood",
            "look at what it prints: ranks want NVLink (NV1, NV18 ...) between them",
        )
    else:
        for link in sorted(set(links.values()), key=lambda link: not gpu_links.is_nvlink(link)):
            pairs = [pair for pair in links if links[pair] == link]
            which = f"all {len(pairs)}" if len(pairs) == len(links) else str(len(pairs))
            fast, text = gpu_links.is_nvlink(link), gpu_links.pairs_text(pairs)
            yield Finding(
                "ok" if fast else "note",
                "GPU links",
                f"{link} ({gpu_links.meaning(link)}) joins {which} pair(s): {text}",
                ""
                if fast
                else "without NVLink rows take several times as long: make groups of GPUs that "
                "NVLink joins, or see nvidia-smi nvlink --status if these should be",
            )
    access = gpu_links.access(ask_nvidia_smi("topo", "-p2p", "r"))
    if access is None:
        yield Finding(
            "note",
            "GPU peer access",
            "cannot be told: nvidia-smi topo -p2p r printed no table that is understood",
            "look at what it prints: ranks of a group must read each other's memory",
        )
        return
    refused = {pair: why for pair, why in access.items() if why != "OK"}
    if not refused:
        yield Finding("ok", "GPU peer access", "every GPU reads the memory of all others")
        return
    apart = {(min(pair), max(pair)) for pair in refused}
    yield Finding(
        "note",
        "GPU peer access",
        f"{gpu_links.pairs_text(apart)} do not read each other's memory "
        f"({', '.join(sorted(set(refused.values())))} in nvidia-smi topo -p2p r)",
        "the native backend needs groups without such pairs: choose others with "
        "CUDA_VISIBLE_DEVICES, or see whether IOMMU, ACS or the driver forbids it; "
        "backend='reference' works without",
    )


def _reach() -> Iterator[Finding]:
    """What other processes of this host could read of each GPU's arrays."""
    import jax

    from jax_ep import _compat
    from jax_ep._groups import gpu_side, memory

    if importlib.util.find_spec("jax_ep._cuda") is None:
        return
    for device in jax.local_devices():
        ordinal = _compat.local_ordinal(device)
        if device.platform != "gpu" or ordinal is None:
            continue
        name = f"arrays of GPU {ordinal}"
        reason = memory.why_not_in_place(gpu_side.library(), ordinal)
        if reason == "":
            yield Finding("ok", name, "other processes of this host can read them in place")
            continue
        yield Finding(
            "note",
            name,
            f"other processes cannot read them in place ({reason}): groups that span processes "
            f"copy operands first, into {memory.staging_bytes()} bytes "
            "(JAX_EP_STAGING_BYTES)",
            "unset XLA_PYTHON_CLIENT_PREALLOCATE and XLA_PYTHON_CLIENT_ALLOCATOR, so that XLA "
            "allocates its memory at once",
        )


def _sharing() -> Iterator[Finding]:
    """Whether processes that share a GPU run side by side on it."""
    if shutil.which("nvidia-smi") is None:
        return
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    if os.path.exists(os.path.join(pipes, "control")):
        yield Finding("ok", "MPS", f"it runs, in {pipes}")
    else:
        yield Finding(
            "note",
            "MPS",
            "it does not run: ranks that share a GPU, each in a process of its own, wait for each "
            "other's time slices in every op",
            "nothing with one process for each GPU; else start it: nvidia-cuda-mps-control -d",
        )


def _xla_flags() -> Iterator[Finding]:
    """Flags under which ops of one group could run at the same time."""
    flag = "--xla_gpu_command_buffer_scheduling_mode"
    for word in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = word.partition("=")
        if name == flag and value.upper() == "CONCURRENT":
            yield Finding(
                "fail",
                "XLA_FLAGS",
                f"{word} runs ops that do not depend on each other at once, which is an error "
                "within a group of GPUs",
                f"take {flag} out of XLA_FLAGS",
            )


def _transport() -> Iterator[Finding]:
    """How a group of all devices would exchange rows."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    yield transport.of_group_on(mesh)


def _round_trip() -> Iterator[Finding]:
    """Dispatch and combine on every local device, on each backend, against the plain sum."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_ep

    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    num_tokens, hidden, top_k = 16, 64, 2
    num_experts = 2 * len(devices)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(devices) * num_tokens, hidden)).astype(np.float32)
    scores = rng.random((len(x), num_experts))
    topk_idx = np.argsort(scores, axis=1)[:, :top_k].astype(np.int32)
    backends: tuple[Literal["auto", "reference"], ...] = ("auto", "reference")
    groups = [
        jax_ep.create_group(mesh, "expert", backend=backend, timeout=60) for backend in backends
    ]
    for group in {group.backend: group for group in groups}.values():
        spec = jax.sharding.PartitionSpec("expert")

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        def round_trip(x, topk_idx, group=group):
            out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=num_experts)
            return jax_ep.combine(out.tokens, out.handle, group=group)

        y = np.asarray(round_trip(jnp.asarray(x), jnp.asarray(topk_idx)))
        name = f"round trip, backend {group.backend!r}"
        if np.array_equal(y, top_k * x):
            yield Finding("ok", name, f"{len(devices)} rank(s), exact")
        else:
            error = float(np.abs(y - top_k * x).max())
            yield Finding("fail", name, f"wrong by up to {error}", "please report this as a bug")
