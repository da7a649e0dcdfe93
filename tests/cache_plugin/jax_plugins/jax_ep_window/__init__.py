"""Makes keys of JAX's persistent compilation cache that one GPU can fill for two.

JAX imports what it finds in the namespace package ``jax_plugins`` when it starts, so ``PYTHONPATH``
brings this into all processes of a run (see ``tests/window_cache.py``). It changes three things:

* The key of a program on GPUs holds the kinds of its devices and not the fingerprint of their topology,
  which tells one process with two GPUs from two processes with one each, and hosts by their CPUs. XLA
  compiles the same for them. It is what JAX itself does where a topology has no fingerprint.
* Entries appear by a rename. JAX writes them in place, and a process that reads meanwhile would warn.
* Programs for CPU are not cached: they would be loaded on other CPUs.

Every look into the cache adds a line to the file ``$JAX_EP_WINDOW_LOOKUPS.PID``, if that is set.
"""

from __future__ import annotations

import os


def initialize() -> None:
    """Called by JAX before it makes its first client."""
    import jax
    from jax._src import cache_key, compilation_cache, lru_cache

    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return

    class Cache(lru_cache.LRUCache):  # type: ignore[misc]
        """As JAX's, but that entries are never seen half written."""

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

    cache_key._hash_accelerator_config = cache_key._hash_devices
    compilation_cache.get_file_cache = lambda path: (Cache(path, max_size=-1), path)


def note(what: str, key: str) -> None:
    """Add a line to this process' file of looks into the cache."""
    if prefix := os.environ.get("JAX_EP_WINDOW_LOOKUPS"):
        with open(f"{prefix}.{os.getpid()}", "a") as file:
            file.write(f"{what} {key}\n")
