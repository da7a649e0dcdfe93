"""A Flax Linen model with ``jax_ep.linen.MoE`` in place of its MLP: docs/guides/flax_linen.md.

Runs on eight CPU devices if there are no others::

    python examples/port_linen.py

The parts between ``# [name]`` and ``# [end]`` are shown in the guide, by docs/render_guides.py.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding

import jax_ep

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, NUM_BLOCKS = 32, 16, 12, 2, 2
PAD = 0  # the id of padding tokens


# [block]
class Block(nn.Module):
    """Attention, and experts where the MLP was."""

    group: jax_ep.Group

    def setup(self) -> None:
        """Make the parts of the block."""
        self.attention = nn.MultiHeadDotProductAttention(HEADS)
        # before: self.mlp = MLP(INTERMEDIATE)
        self.moe = jax_ep.linen.MoE(
            HIDDEN,
            INTERMEDIATE,
            num_experts=4 * self.group.size,
            top_k=2,
            group=self.group,
            router=jax_ep.routing.Router("sigmoid", noise_std=0.01),
            router_bias=True,
            sequence_loss=True,
            partition_names=jax_ep.PartitionNames(hidden="data"),
        )

    def __call__(self, x, mask):
        """Outputs of the tokens ``x`` ``[B, S, H]``, and what the layer reports."""
        x = x + self.attention(x)
        # before: return x + self.mlp(x)
        y, aux = self.moe(x, mask=mask)  # takes its noise from make_rng("router")
        return x + y, aux

    def update_router_bias(self, load):
        """Move the router's bias towards even load."""
        self.moe.update_router_bias(load, rate=1e-3)


save_plan = jax.checkpoint_policies.save_only_these_names("jax_ep.handle")


class Model(nn.Module):
    """A language model of a few blocks."""

    group: jax_ep.Group

    def setup(self) -> None:
        """Make the blocks, each of which is computed again in the backward pass."""
        remat_block = nn.remat(Block, policy=save_plan)
        self.embed = nn.Embed(VOCABULARY, HIDDEN)
        self.blocks = [remat_block(self.group) for _ in range(NUM_BLOCKS)]
        self.head = nn.Dense(VOCABULARY)

    def __call__(self, ids):
        """Logits of the tokens ``ids`` ``[B, S]``, and what each block reports."""
        x, auxes = self.embed(ids), []
        for block in self.blocks:
            x, aux = block(x, ids != PAD)
            auxes.append(aux)
        return self.head(x), auxes

    def update_router_biases(self, loads):
        """Move the biases of all routers, given ``aux.load`` of each block."""
        for block, load in zip(self.blocks, loads, strict=True):
            block.update_router_bias(load)


# [end]


# [make]
def make(mesh, ids):
    """The group, the model, its optimizer, and variables with the optimizer's state on ``mesh``."""
    group = jax_ep.create_group(mesh, "expert")
    model, optimizer = Model(group), optax.adamw(1e-2)

    def init(key):
        variables = model.init(key, ids)  # {"params": ..., "router_bias": ...}
        return variables, optimizer.init(variables["params"])

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = nn.get_sharding(shapes, mesh)  # from the names that the layer gives its weights
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    return group, model, optimizer, nn.unbox(state)


# [end]


# [step]
def loss_fn(model, params, biases, ids, labels, router_key=None):
    """Loss of a batch. Padding is in no mean; without a key the router has no noise."""
    rngs = None if router_key is None else {"router": router_key}
    logits, auxes = model.apply({"params": params, **biases}, ids, rngs=rngs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = jnp.mean(losses, where=ids != PAD)
    for aux in auxes:
        loss += 1e-2 * aux.aux_loss + 1e-3 * aux.z_loss + 1e-4 * aux.sequence_loss
    return loss, auxes


def make_step(model, optimizer):
    """A step that moves the weights, and the routers' biases towards even load."""

    @jax.jit
    def train_step(state, ids, labels, router_key):
        variables, optimizer_state = state
        params = variables["params"]
        biases = {"router_bias": variables["router_bias"]}
        grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
        (loss, auxes), grads = grad_fn(model, params, biases, ids, labels, router_key)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        loads = [aux.load for aux in auxes]
        _, biases = model.apply(
            variables, loads, method="update_router_biases", mutable=["router_bias"]
        )
        variables = {"params": optax.apply_updates(params, updates), **biases}
        return (variables, optimizer_state), loss, sum(aux.num_dropped for aux in auxes)

    return train_step


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
    ids, labels = make_batch(mesh)
    group, model, optimizer, state = make(mesh, ids)
    train_step = make_step(model, optimizer)
    losses = []
    # [loop]
    key = jax.random.key(2)
    for index in range(4):
        router_key = jax.random.fold_in(key, index)
        state, loss, num_dropped = train_step(state, ids, labels, router_key)
        losses.append(float(loss))
        group.check()  # a failed op on GPUs gives NaN; this raises its error
        print(f"step {index}: loss {losses[-1]:.4f}, {num_dropped} rows dropped")
    # [end]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "step_4"
        # [checkpoint]
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
        *_, fresh = make(mesh, ids)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, fresh)  # puts each array where that of fresh lies
        # [end]
    _, loss, _ = train_step(state, ids, labels, key)
    _, again, _ = train_step(restored, ids, labels, key)
    print(f"step 4: loss {loss:.4f}, after a restart {again:.4f}")
    return [*losses, float(loss), float(again)]


if __name__ == "__main__":
    main()
