"""Changes the keys of JAX's persistent compilation cache, so that one GPU can fill it for two.

JAX imports what it finds in the namespace package ``jax_plugins`` when it starts, so ``PYTHONPATH``
brings this into all processes of a run (see ``window_cache.py``). It changes three things:

* The key of a program on GPUs has the kinds of its devices and not the fingerprint of their
  topology, which differs between hosts with other CPUs. The key has the spread of devices over
  processes only if the program has collectives of XLA, or if XLA's partitioner may add some. XLA
  compiles a small all-reduce for the GPUs of one process to a kernel that reads invalid addresses
  where processes have one GPU each. All other programs are compiled to the same in all modes.
* Entries appear by a rename. JAX writes them in place, so a process that reads meanwhile would warn.
* Programs for CPU are not cached, because they would be loaded on other CPUs.

Every look into the cache adds a line to the file ``$JAX_EP_WINDOW_LOOKUPS.PID``, if that is set.
"""

from __future__ import annotations

import os
import threading
from typing import Any

_COLLECTIVES = {
    f"stablehlo.{name}"
    for name in (
        *("all_gather", "all_reduce", "all_to_all", "collective_broadcast"),
        *("collective_permute", "reduce_scatter"),
    )
}
_OUTSIDE = {"sdy.manual_computation", "func.return"}  # all that a shard_map alone consists of


def initialize() -> None:
    """Called by JAX before it makes its first client."""
    import jax
    from jax._src import cache_key, compilation_cache, lru_cache

    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return

    class Cache(lru_cache.LRUCache):  # type: ignore[misc]
        """JAX's cache, except that nobody sees half-written entries."""

        def get(self, key: str) -> bytes | None:
            found = super().get(key)
            note("missed" if found is None else "found", key)
            return found

        def put(self, key: str, value: bytes) -> None:
            path = self.path / f"{key}-cache"
            if not path.exists():
                part = self.path / f".{os.getpid()}.part"
                part.write_bytes(value)
                part.replace(path)

    hash_computation, local = cache_key._hash_computation, threading.local()

    def hash_and_look(hash_obj: Any, module: Any, *rest: Any) -> None:
        local.has_collectives = has_collectives(module)
        hash_computation(hash_obj, module, *rest)

    def hash_devices(hash_obj: Any, devices: Any) -> None:
        cache_key._hash_devices(hash_obj, devices)
        if local.has_collectives and devices.size > 1:
            places = [device.process_index for device in devices.flat]
            cache_key._hash_string(hash_obj, f"processes {places}")

    cache_key._hash_computation = hash_and_look
    cache_key._hash_accelerator_config = hash_devices
    compilation_cache.get_file_cache = lambda path: (Cache(path, max_size=-1), path)


def has_collectives(module: Any) -> bool:
    """Whether a program may have collectives of XLA."""
    from jax._src.lib.mlir import ir

    found = False

    def look(operation: Any) -> Any:
        nonlocal found
        name, parent = operation.name, operation.parent
        if parent is not None and parent.name == "func.func" and _is_main(parent):
            found |= name not in _OUTSIDE
        if name == "stablehlo.custom_call":
            found |= "ragged_all_to_all" in str(operation.attributes["call_target_name"])
        else:
            found |= name in _COLLECTIVES
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    return found


def _is_main(function: Any) -> bool:
    return str(function.attributes["sym_name"]) == '"main"'


def note(what: str, key: str) -> None:
    """Add a line to this process' file of looks into the cache."""
    if prefix := os.environ.get("JAX_EP_WINDOW_LOOKUPS"):
        with open(f"{prefix}.{os.getpid()}", "a") as file:
            file.write(f"{what} {key}\n")
