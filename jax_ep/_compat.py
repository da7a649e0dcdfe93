"""The only module that knows about differences between JAX versions or about JAX's private parts.

Everything else in the package uses the helpers below, so only this file has to follow a new JAX
release.
"""

from __future__ import annotations

import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.extend.core
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

OLDEST_JAX = (0, 10, 2)


def check_version(found: tuple[int, ...]) -> None:
    """Raise an ImportError where JAX is too old, before something else fails without a reason."""
    if found < OLDEST_JAX:
        oldest, got = (".".join(map(str, version)) for version in (OLDEST_JAX, found))
        raise ImportError(
            f"jax_ep: expected jax {oldest} or later, got {got}; pip install 'jax>={oldest}' "
            f"'jaxlib>={oldest}'."
        )


check_version(jax.__version_info__)


def varying_axes(x: Any) -> frozenset[str]:
    """Names of the manual mesh axes over which ``x`` varies (empty when they are not tracked).

    ``x`` may be an abstract value.
    """
    aval = aval_of(x)
    manual_type = getattr(aval, "manual_axis_type", None)
    if manual_type is not None:
        return frozenset(manual_type.varying)
    return frozenset(getattr(aval, "vma", None) or ())


def aval_of(x: Any) -> Any:
    """The abstract value of ``x``, which may be one itself."""
    return x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)


def tracks_varying_axes(axis_names: Sequence[str]) -> bool:
    """Whether the current trace tracks varying axes (``shard_map(..., check_vma=True)``)."""
    return bool(varying_axes(lax.axis_index(tuple(axis_names))))


def cast_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Cast ``x`` to vary over ``axes`` too; its transpose sums cotangents over the added ones."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    return lax.pcast(x, missing, to="varying")


def backward(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A backward rule for ``jax.custom_vjp`` that ``vmap(..., spmd_axis_name=)`` can batch.

    Inside such a ``vmap``, JAX casts an unbatched value to vary over the mesh axis where it meets a
    batched one. While JAX traces backward rules it forgets the axis, so it refuses to mix the two
    (JAX 0.10.2 to 0.12.0).
    """

    @functools.wraps(rule)
    def with_axes(*args: Any) -> Any:
        names = frozenset[str]().union(*map(_spmd_axes, jax.tree.leaves(args)))
        if not names:
            return rule(*args)
        from jax._src import core

        with core.add_spmd_axis_names(names):
            return rule(*args)

    return with_axes


def _spmd_axes(x: Any) -> frozenset[str]:
    """The ``spmd_axis_name`` axes of the ``vmap``s that batch ``x``."""
    names = frozenset[str]()
    while isinstance(x, jax.core.Tracer) and hasattr(x, "batch_dim"):
        names |= frozenset(spmd_axes(x._trace.axis_data))
        x = x.val
    return names


def is_in_spmd_vmap() -> bool:
    """Whether what is being traced is called by ``vmap(..., spmd_axis_name=)``."""
    from jax._src import core

    return bool(core.get_axis_env().spmd_axis_names)


def spmd_axes(axis_data: Any) -> tuple[str, ...]:
    """The mesh axes that a ``vmap`` is spread over, from what its batching rules are given."""
    return tuple(axis_data.spmd_name or ())


def aval_like(aval: Any, shape: Sequence[int], dtype: Any) -> Any:
    """An abstract value of ``shape`` and ``dtype`` that varies over the same axes as ``aval``."""
    dtype = jax.numpy.dtype(dtype)
    return aval.update(shape=tuple(shape), dtype=dtype, weak_type=False)


# Keyed by the module that is being lowered. An entry disappears with its module.
_counters: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


def next_in_module(ctx: mlir.LoweringRuleContext) -> int:
    """0, 1, 2, …: how often this was called before for the module that ``ctx`` lowers into."""
    return next(_counters.setdefault(ctx.module_context.module, itertools.count()))


def notes_of_lowering(ctx: mlir.LoweringRuleContext) -> dict[Any, Any]:
    """A dictionary for notes about the module that ``ctx`` lowers into; it goes with the lowering.

    Notes hold values of the module, so no object that outlives the lowering may hold them.
    """
    return ctx.module_context.cached_primitive_lowerings


def register_lowering_of_each(primitive: Primitive, rule: mlir.LoweringRule) -> None:
    """Register a lowering rule that is called for each equation, also for equal ones."""
    mlir.register_lowering(primitive, rule, cacheable=False)


def manual_axes() -> tuple[str, ...]:
    """Names of the mesh axes that are manual in the current trace."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(getattr(mesh, "manual_axes", ()))


def context_mesh() -> Any:
    """The mesh of the current trace, with the types that its axes have there."""
    return jax.sharding.get_abstract_mesh()


def context_axis_sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh of the current trace."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def register_ffi_types(types: dict[str, dict[str, Any]], *, platform: str) -> None:
    """Register the state types of FFI handlers with the runtime of ``platform``."""
    for name, info in types.items():
        jax.ffi.register_ffi_type(name, cast(Any, info), platform=platform)


def local_ordinal(device: Any) -> int | None:
    """The CUDA ordinal of ``device`` in this process; None if it belongs to another one."""
    return device.local_hardware_id


def compute_capability(device: Any) -> str:
    """The compute capability of a GPU, as in "9.0"."""
    return str(getattr(device, "compute_capability", "unknown"))


def key_value_set(key: str, value: bytes) -> None:
    """Publish a value to all processes of the program."""
    _key_value_store().key_value_set_bytes(key, value)


def key_value_get(key: str, timeout: float) -> bytes:
    """A value that a process published; waits for it, ``timeout`` seconds at most."""
    return _key_value_store().blocking_key_value_get_bytes(key, int(timeout * 1000))


def wait_for_all(key: str, timeout: float) -> None:
    """Wait until all processes of the program have called this, ``timeout`` seconds at most.

    Raises:
        Exception: that of JAX's key-value store where not all came.
    """
    _key_value_store().wait_at_barrier(key, int(timeout * 1000))


def num_started_cpu_devices() -> int | None:
    """CPU devices that JAX has started in this process; None if it has started no devices yet."""
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        return None
    cpu = xla_bridge.backends().get("cpu")
    return 0 if cpu is None else cpu.local_device_count()


def is_compile_only(device: Any) -> bool:
    """Whether programs cannot run on ``device``: it is one of a topology, or an imagined one."""
    client = getattr(device, "client", None)
    return client is None or getattr(client, "runtime_type", None) == "compile_only_runtime"


def targets_hopper() -> bool:
    """Whether what is being traced is for GPUs of compute capability 9.0.

    The mesh of the trace says so, whose devices may be compile-only, else the default devices.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return _default_is_hopper()
    return device.platform == "gpu" and is_hopper(device.device_kind)


def is_hopper(device_kind: str) -> bool:
    """Whether GPUs of that name have compute capability 9.0."""
    return _HOPPER.search(device_kind) is not None


_HOPPER = re.compile(r"\bG?H\d+")  # H100, H200, H800, H20, GH200


@functools.cache
def _default_is_hopper() -> bool:
    return jax.default_backend() == "gpu" and compute_capability(jax.local_devices()[0]) == "9.0"


def num_multiprocessors() -> int:
    """Streaming multiprocessors of the GPUs that the program is for."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and device.num_cores is not None:
        return device.num_cores
    return next((d.core_count for d in jax.local_devices() if hasattr(d, "core_count")), 132)


def trace_state() -> Any:
    """What equals itself while the same trace is current, and never another's; holds no trace."""
    return jax.extend.core.get_opaque_trace_state()


def multiprocessor_count(device: Any) -> int | None:
    """Streaming multiprocessors of a GPU, of this process or another; None where that is unknown."""
    count = getattr(device, "core_count", None)
    return count if isinstance(count, int) and count > 0 else None


def broadcast_text(key: str, text: str | None, *, timeout: float) -> str:
    """Send the ``text`` of the one process that gives it to all processes that call this.

    Args:
        key: A name of this broadcast and no other, the same in all processes.
        text: The text to send; None in the processes that receive it.
        timeout: Seconds to wait for it.

    Raises:
        Exception: from JAX's key-value store, if the text does not come in time.
    """
    client = _key_value_store()
    if client is None:
        assert text is not None
        return text
    if text is not None:
        client.key_value_set(key, text, allow_overwrite=True)
        return text
    return client.blocking_key_value_get(key, int(timeout * 1000))


def all_gather_text(key: str, text: str, *, timeout: float = 600.0) -> list[str]:
    """The texts of all processes, ordered by their indices; ``key`` as in ``broadcast_text``."""
    if jax.process_count() == 1:
        return [text]
    mine = jax.process_index()
    return [
        broadcast_text(f"{key}/{index}", text if index == mine else None, timeout=timeout)
        for index in range(jax.process_count())
    ]


def _key_value_store() -> Any:
    """The client of ``jax.distributed``, or None where it is not initialised."""
    from jax._src import distributed

    return distributed.global_state.client
