"""A Flax NNX model with ``jax_ep.nnx.MoE`` in place of its MLP: the program of docs/guides/flax_nnx.md.

Runs on eight CPU devices if there are no others::

    python examples/port_nnx.py

The parts between ``# [name]`` and ``# [end]`` are shown in the guide, by docs/render_guides.py.
"""

import functools
import os
import pathlib
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import jax_ep

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, NUM_BLOCKS = 32, 16, 12, 2, 2
PAD = 0  # the id of padding tokens


# [block]
save_plan = jax.checkpoint_policies.save_only_these_names("jax_ep.handle")


class Block(nnx.Module):
    """Attention, and experts where the MLP was."""

    def __init__(self, group: jax_ep.Group, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(HEADS, HIDDEN, decode=False, rngs=rngs)
        # before: self.mlp = MLP(HIDDEN, INTERMEDIATE, rngs=rngs)
        self.moe = jax_ep.nnx.MoE(
            HIDDEN,
            INTERMEDIATE,
            num_experts=4 * group.size,
            top_k=2,
            group=group,
            router=jax_ep.routing.Router("sigmoid", noise_std=0.01),
            router_bias=True,
            sequence_loss=True,
            partition_names=jax_ep.PartitionNames(hidden="data"),
            rngs=rngs,
        )

    @functools.partial(nnx.remat, policy=save_plan)
    def __call__(self, x, mask, router_key):
        """Outputs of the tokens ``x`` ``[B, S, H]``, and what the layer reports."""
        x = x + self.attention(x)
        # before: return x + self.mlp(x)
        y, aux = self.moe(x, mask=mask, router_key=router_key)
        return x + y, aux


# [end]


class Model(nnx.Module):
    """A language model of a few blocks."""

    def __init__(self, group: jax_ep.Group, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(group, rngs) for _ in range(NUM_BLOCKS)])
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, ids, router_key=None):
        """Logits of the tokens ``ids`` ``[B, S]``, and what each block reports."""
        x, auxes = self.embed(ids), []
        for index, block in enumerate(self.blocks):
            key = None if router_key is None else jax.random.fold_in(router_key, index)
            x, aux = block(x, ids != PAD, key)
            auxes.append(aux)
        return self.head(x), auxes


# [step]
def loss_fn(model, ids, labels, router_key=None):
    """Loss of a batch. Padding is in no mean; without a key the router has no noise."""
    logits, auxes = model(ids, router_key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = jnp.mean(losses, where=ids != PAD)
    for aux in auxes:
        loss += 1e-2 * aux.aux_loss + 1e-3 * aux.z_loss + 1e-4 * aux.sequence_loss
    return loss, auxes


@nnx.jit
def train_step(model, optimizer, ids, labels, router_key):
    """Move the weights along the gradient, and the routers' biases towards even load."""
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, auxes), grads = grad_fn(model, ids, labels, router_key)
    optimizer.update(model, grads)
    for block, aux in zip(model.blocks, auxes, strict=True):
        block.moe.update_router_bias(aux.load, rate=1e-3)
    return loss, sum(aux.num_dropped for aux in auxes)


# [end]


# [make]
def make(mesh):
    """The group, the model and its optimizer, all on ``mesh``."""
    group = jax_ep.create_group(mesh, "expert")
    model = Model(group, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    state = nnx.state((model, optimizer))  # the experts lie on the mesh, the rest on one device
    shardings = nnx.get_named_sharding(state, mesh)
    nnx.update((model, optimizer), jax.device_put(state, shardings))
    return group, model, optimizer


# [end]


# [checkpoint]
def save(folder, model, optimizer):
    """Write weights, router biases and the optimizer's state."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, nnx.state((model, optimizer)))


def restore(folder, model, optimizer):
    """Read them into a model and an optimizer that ``make`` has made, on any mesh."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder, nnx.state((model, optimizer)))
    nnx.update((model, optimizer), state)


# [end]


def make_batch(mesh):
    """Ids and the ids to predict, split over "data"; the last tokens of each row are padding."""
    ids = jax.random.randint(jax.random.key(1), (2 * mesh.shape["data"], 8), 1, VOCABULARY)
    ids = jnp.where(jnp.arange(8) < 6, ids, PAD)
    batch = ids, (5 * ids + 1) % VOCABULARY
    return jax.device_put(batch, NamedSharding(mesh, jax.P("data")))


def main() -> list[float]:
    """Train on all devices, save, restore, and return the losses."""
    data = 2 if jax.device_count() % 2 == 0 and jax.device_count() >= 4 else 1
    sizes = (data, jax.device_count() // data)
    # [mesh]
    mesh = jax.make_mesh(sizes, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    # [end]
    group, model, optimizer = make(mesh)
    ids, labels = make_batch(mesh)
    losses = []
    # [loop]
    key = jax.random.key(2)
    for index in range(4):
        router_key = jax.random.fold_in(key, index)
        loss, num_dropped = train_step(model, optimizer, ids, labels, router_key)
        losses.append(float(loss))
        group.check()  # a failed op on GPUs gives NaN; this raises its error
        print(f"step {index}: loss {losses[-1]:.4f}, {num_dropped} rows dropped")
    # [end]
    with tempfile.TemporaryDirectory() as folder:
        save(pathlib.Path(folder) / "step_4", model, optimizer)
        _, other, other_optimizer = make(mesh)
        restore(pathlib.Path(folder) / "step_4", other, other_optimizer)
    loss, _ = train_step(model, optimizer, ids, labels, key)
    again, _ = train_step(other, other_optimizer, ids, labels, key)
    print(f"step 4: loss {loss:.4f}, after a restart {again:.4f}")
    return [*losses, float(loss), float(again)]


if __name__ == "__main__":
    main()
