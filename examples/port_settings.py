"""Settings for training: capacity, padding, remat, fp8 rows. The program of docs/guides/settings.md.

Runs on eight CPU devices if there are no others::

    python examples/port_settings.py

The parts between ``# [name]`` and ``# [end]`` are shown in the guide, by docs/render_guides.py.
"""

import functools
import math
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

import jax_ep

HIDDEN, INTERMEDIATE, TOP_K = 128, 32, 2


# [memory]
def memory(*, tokens, hidden, intermediate, top_k, num_experts, ranks, factor=None, itemsize=2):
    """Rows that a rank has room for, and the bytes of a layer's arrays of rows.

    ``tokens`` are those of one rank; ``factor`` is ``rank_capacity_factor``; bf16 has 2 bytes.
    """
    rows = ranks * tokens * min(top_k, num_experts // ranks)  # room for any routing
    if factor is not None:
        rows = min(rows, math.ceil(factor * tokens * top_k))
    in_and_out = 2 * rows * hidden * itemsize  # dispatched rows, outputs of the experts
    inside = 3 * rows * intermediate * itemsize  # gate, up, their product
    return rows, in_and_out + inside


# [end]


# [layer]
save_plan = jax.checkpoint_policies.save_only_these_names("jax_ep.handle")


def make_layer(group, num_experts, **options):
    """A layer that computes its rows again in the backward pass, but not its plan."""

    @functools.partial(jax.checkpoint, policy=save_plan)
    def layer(x, params, mask):
        y, aux = jax_ep.moe(
            x, params, group=group, num_experts=num_experts, top_k=TOP_K, mask=mask, **options
        )
        return x + y, aux

    return layer


# [end]


def make_data(group, dtype=jnp.bfloat16):
    """Tokens of which some are padding, split over the group, and the weights of a layer.

    The tokens have a part in common, so that some experts get more of them than others.
    """
    mesh, num_experts = group.mesh, 4 * group.size
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2 * group.size, 16, HIDDEN))
    x = (x + jax.random.normal(keys[2], (HIDDEN,))).astype(dtype)
    mask = jnp.broadcast_to(jnp.arange(16) < 12, x.shape[:-1])
    x, mask = jax.device_put((x, mask), NamedSharding(mesh, jax.P("expert")))
    params = jax_ep.init_moe_params(
        keys[1], hidden=HIDDEN, intermediate=INTERMEDIATE, num_experts=num_experts
    )
    specs = jax_ep.moe_partition_specs(params, group=group)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return x, jax.device_put(params, shardings), mask


def run(layer, x, params, mask):
    """Output, report and gradients."""

    def loss_fn(params):
        y, aux = layer(x, params, mask)
        return jnp.mean(jnp.square(y.astype(jnp.float32))) + 0.01 * aux.aux_loss, (y, aux)

    (_, (y, aux)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    return y, aux, grads


def main() -> None:
    """Run the layer with each setting, and say what is dropped and what it changes."""
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    group = jax_ep.create_group(mesh, "expert")
    x, params, mask = make_data(group)
    num_experts = 4 * group.size
    before, _, _ = run(make_layer(group, num_experts), x, params, mask)
    # [settings]
    bounded = make_layer(group, num_experts, rank_capacity_factor=1.25)
    in_fp8 = make_layer(group, num_experts, rank_capacity_factor=1.25, quantization="fp8")
    # [end]
    for name, layer in (("bf16 rows", bounded), ("fp8 rows", in_fp8)):
        y, aux, _ = run(layer, x, params, mask)
        # [report]
        dropped = aux.num_dropped / aux.load.sum()
        # [end]
        group.check()
        change = jnp.abs(y.astype(jnp.float32) - before.astype(jnp.float32)).max()
        print(
            f"{name}: {dropped:.1%} of the rows dropped, largest change of an output {change:.3f}"
        )
        before = y


if __name__ == "__main__":
    main()
