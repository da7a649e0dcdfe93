"""A mixture-of-experts layer over eight devices: output, load and a gradient.

Runs on eight CPU devices if there are no others::

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
    """Run the layer once forward and once backward."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8]
    )
    group = jax_ep.create_group(mesh, "expert")
    layer = jax_ep.nnx.MoE(64, 128, num_experts=16, top_k=2, group=group, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 32, 64))
    x = jax.device_put(x, NamedSharding(mesh, jax.P("data")))

    @nnx.jit
    def step(layer, x):
        def loss_fn(layer):
            y, aux = layer(x)
            return jnp.mean(y**2) + 0.01 * aux.aux_loss, aux

        return nnx.value_and_grad(loss_fn, has_aux=True)(layer)

    (loss, aux), grads = step(layer, x)
    print(f"{x.shape[0] * x.shape[1]} tokens, 2 of 16 experts each, on {group}")
    print(f"routes to each expert: {aux.load}, balance loss {aux.aux_loss:.3f} (1 is even)")
    gates = grads["gate"][...]
    print(f"loss {loss:.4f}, gradient of the gates {gates.shape} split as {gates.sharding.spec}")


if __name__ == "__main__":
    main()
