"""Small layers with experts of any kind: sizes, groups and data, and programs around a layer.

The programs are compared with the same ones around a dense layer (``dense_experts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from dense_experts import check_same

H, F, E, K, S = 8, 12, 4, 2, 8  # of the layer; S is the width of the shared expert

# ``(x, params)`` to the output and what moe reports.
Layer = Callable[[jax.Array, jax_ep.MoEParams], tuple[jax.Array, Any]]


def draw(seed: int, *shape: int) -> jax.Array:
    """Normal numbers with a deviation of a half."""
    return jax.random.normal(jax.random.key(seed), shape) / 2


def make_x(*shape: int) -> jax.Array:
    """Tokens."""
    return 2 * draw(9, *shape, H)


def make_group(ranks: int | str, backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    """A group of so many ranks; "2x2" has two groups of two."""
    names = ("data", "expert")
    sizes = (2, 2) if ranks == "2x2" else (1, ranks)
    sizes = tuple(2 if size == 3 else size for size in spmd.fit(sizes, names))
    return spmd.create_group(spmd.make_mesh(sizes, names, axis_type), "expert", backend=backend)


def own_params(
    experts: Any, *, shared: bool = False, hidden: int = H, seed: int = 0
) -> jax_ep.MoEParams:
    """Weights of a layer whose experts are a function of the user's own, with its weights."""
    shared_up = draw(1, hidden, S)
    return jax_ep.MoEParams(
        router_kernel=draw(seed, hidden, E),
        shared=jax_ep.SharedExpert(shared_up, -shared_up, draw(2, S, hidden)) if shared else None,
        experts=experts,
    )


def check_scanned(
    layer: Layer,
    dense: Layer,
    params: Sequence[jax_ep.MoEParams],
    *,
    mesh: Mesh,
    saved: Sequence[str],
) -> None:
    """A scan over checkpointed residual layers, which save what has these names."""
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def around(layer: Layer) -> Layer:
        def block(x, params):
            y, aux = layer(x, params)
            return x + y, tuple(aux[:2])

        def network(x, params):
            x, (losses, loads) = lax.scan(jax.checkpoint(block, policy=policy), x, params)
            return x, (losses.sum(), loads.sum(0))

        return network

    stacked = jax.tree.map(lambda *a: jnp.stack(a), *params)
    check_same(around(layer), around(dense), make_x(2, 3), stacked, mesh=mesh, tolerance=1e-4)


def check_in_stages(
    layer_of: Callable[[jax_ep.Group], Layer],
    dense: Layer,
    params_of: Callable[[int], jax_ep.MoEParams],
    backend: str,
) -> None:
    """Layers side by side along an axis "stage", each inside a ``shard_map`` over that axis."""
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names)
    layer = layer_of(jax_ep.create_group(mesh, "expert", backend=backend))
    stages = [params_of(stage) for stage in range(mesh.shape["stage"])]
    params = jax.tree.map(lambda *a: jnp.stack(a), *stages)

    def stage(x, params):
        y, aux = layer(x[0], jax.tree.map(lambda w: w[0], params))
        return y[None], (aux.aux_loss[None], aux.load[None])

    mapped = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(P("stage"), P("stage")),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def summed(run: Layer) -> Layer:
        def layers(x, params):
            y, (losses, loads) = run(x, params)
            return y, (losses.sum(), loads)

        return layers

    check_same(summed(mapped), summed(jax.vmap(dense)), make_x(len(stages), 5), params, mesh=mesh)
