"""A mixture-of-experts layer over all devices: output, load and a gradient.

Runs on eight CPU devices if there are no others, or on N with
``XLA_FLAGS=--xla_force_host_platform_device_count=N``::

    python examples/moe_layer.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import jax_ep


def main() -> None:
    """Run a layer once forward and once backward on all devices."""
    devices = jax.device_count()
    # Two groups of ranks side by side, if each of them then has at least two ranks.
    data = 2 if devices % 2 == 0 and devices >= 4 else 1
    sizes = (data, devices // data)
    # Whole models work on Auto axes as they are.
    run(jax.make_mesh(sizes, ("data", "expert"), axis_types=(AxisType.Auto,) * 2))


def run(mesh: jax.sharding.Mesh) -> None:
    """Make the layer on ``mesh``, run it, and print the results."""
    group = jax_ep.create_group(mesh, "expert")
    num_experts = 4 * group.size
    layer = jax_ep.nnx.MoE(64, 128, num_experts=num_experts, top_k=2, group=group, rngs=nnx.Rngs(0))
    data = mesh.shape["data"]
    x = jax.random.normal(jax.random.key(0), (data, 16 * group.size, 64))
    x = jax.device_put(x, NamedSharding(mesh, jax.P("data")))

    @nnx.jit
    def step(layer, x):
        def loss_fn(layer):
            y, aux = layer(x)
            return jnp.mean(y**2) + 0.01 * aux.aux_loss, aux

        return nnx.value_and_grad(loss_fn, has_aux=True)(layer)

    (loss, aux), grads = step(layer, x)
    print(f"{x.shape[0] * x.shape[1]} tokens, 2 of {num_experts} experts each, on {group}")
    print(f"routes to each expert: {aux.load}, balance loss {aux.aux_loss:.3f} (1 is even)")
    gates = grads["gate"][...]
    print(f"loss {loss:.4f}, gradient of the gates {gates.shape} split as {gates.sharding.spec}")


if __name__ == "__main__":
    main()
