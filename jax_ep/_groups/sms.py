"""How many SMs an op takes in a group."""

from __future__ import annotations

from jax_ep import _compat
from jax_ep._core.types import Layout
from jax_ep._groups.group import Group
from jax_ep._groups.tuning import Key, TunedOp, clamp_num_sms, default_num_sms, tokens_bucket


def num_sms(
    group: Group,
    *,
    op: TunedOp,
    layout: Layout,
    rows: str,
    hidden: int,
    num_tokens: int,
    requested: int | None = None,
) -> int:
    """The SMs that an op may occupy on the GPUs of ``group``; 0 elsewhere, where it means nothing.

    Args:
        group: The group.
        op: The op.
        layout: Its layout.
        rows: What it moves, by ``rows_name``; "" for a plan.
        hidden: H; 0 for a plan.
        num_tokens: T.
        requested: What ``DispatchConfig.num_sms`` says; taken as it is.

    Returns:
        ``requested``, else the tuned number, else ``default_num_sms``.
    """
    if group.backend != "cuda":
        return 0
    if requested is not None:
        return requested
    device = group.mesh.devices.flat[0]
    sm_count = _compat.multiprocessor_count(device)
    key = Key(device.device_kind, group.size, op, layout, rows, hidden, tokens_bucket(num_tokens))
    tuned = group.tuning.get(key)
    if tuned is None:
        return default_num_sms(layout, sm_count)
    return clamp_num_sms(tuned, sm_count)
