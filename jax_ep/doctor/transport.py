"""Which transport a group takes, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax_ep.doctor.finding import Finding

if TYPE_CHECKING:
    import jax

    from jax_ep._groups.group import Group


def of_group_on(mesh: jax.sharding.Mesh) -> Finding:
    """What a group over the only axis of ``mesh`` would take. All processes of the mesh call this."""
    import jax_ep
    from jax_ep._groups import create

    why = create.why_reference(mesh, mesh.axis_names)
    group = jax_ep.create_group(mesh, mesh.axis_names, timeout=60)
    return of_group(group, why)


def of_group(group: Group, why_reference: str | None) -> Finding:
    """What ``group`` has taken, and ``why_reference`` if it has no native backend."""
    name, ranks = "transport", f"a group of all {group.size} device(s) here"
    hosts = len(group.topology.hosts)
    if group.transport == "nvshmem":
        return Finding(
            "ok",
            name,
            f"{ranks} takes 'nvshmem': it spans {hosts} hosts of {group.topology.ranks_per_host} "
            "rank(s)",
        )
    if group.transport == "peer":
        return Finding(
            "ok",
            name,
            f"{ranks} takes 'peer': its GPUs are of one host and read each other's memory",
        )
    if group.backend == "cpu":
        return Finding(
            "ok", name, f"{ranks} takes none: its CPU devices share the memory of the process"
        )
    on_gpus = group.mesh.devices.flat[0].platform == "gpu"
    return Finding(
        "note",
        name,
        f"{ranks} takes none: the reference moves rows by XLA's collectives, because {why_reference}",
        "docs/network.md says what groups of GPUs need" if on_gpus else "",
    )
