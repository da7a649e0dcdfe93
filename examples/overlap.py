"""A decoder step on two micro-batches, each of whose rows travel while the other one computes.

While rows of the first micro-batch are on their way to the experts, the second one may be in attention;
while those of the second are, the first one is in its experts. Backward it is the same::

    attention 0 | attention 1 | experts 0   | experts 1  |
                | dispatch 0  | dispatch 1  | combine 0  | combine 1

XLA decides, and may put more or less beside an op than the program says: jaxlib 0.11.2 computes both
attentions first, and hides dispatch 1 and combine 0, forward and backward.

Runs on eight CPU devices if there are no others. It trains the block for some steps with ops in flight
and with ops in line, shows that the losses are the same bits, and how long a step takes::

    python examples/overlap.py
    python examples/overlap.py --tokens 4096 --hidden 4096 --width 2048 --profile /tmp/profile

``--profile`` writes one step of each for XProf or Perfetto, where calls have the names of their targets
(jax_ep_dispatch_async) and those in flight are on a stream of their own.
"""

import argparse
import functools
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

HEADS, TOP_K = 4, 2


def init(key, *, hidden, width, num_experts, dtype):
    """Weights of a block, over all experts."""
    shapes = {
        "qkv": (hidden, 3 * hidden),
        "out": (hidden, hidden),
        "router": (hidden, num_experts),
        "gate": (num_experts, hidden, width),
        "up": (num_experts, hidden, width),
        "down": (num_experts, width, hidden),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: (jax.random.normal(k, shape) / shape[-2] ** 0.5).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def norm(x):
    """RMS normalisation."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def attention(x, weights):
    """Causal self-attention over the tokens of this rank, ``[T, H]``, with its residual connection."""
    q, k, v = jnp.split(norm(x) @ weights["qkv"], 3, axis=-1)
    q, k, v = (a.reshape(1, len(x), HEADS, -1) for a in (q, k, v))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return x + mixed.reshape(x.shape) @ weights["out"]


# [experts]
def experts(out, weights, free_sms=None):
    """The gated MLPs of this rank's experts, for the rows that came.

    On GPUs the first product leaves SMs to the op that flies beside it; the op ends before the others.
    """
    gate, up, down = (weights[name] for name in ("gate", "up", "down"))
    gated = jax_ep.grouped_dot(out.tokens, gate, out.group_sizes, num_sms=free_sms)
    gated = jax.nn.silu(gated)
    gated = gated * jax_ep.grouped_dot(out.tokens, up, out.group_sizes)
    gated = (gated * out.weights[:, None]).astype(out.tokens.dtype)
    return jax_ep.grouped_dot(gated, down, out.group_sizes)


# [end]


def route(x, weights):
    """What ``dispatch`` needs of each token: its rows, its experts and their weights."""
    routing = jax_ep.routing.softmax_top_k((norm(x) @ weights["router"]).astype(jnp.float32), TOP_K)
    return norm(x), routing.topk_idx, routing.topk_weights


# [block]
def block_in_flight(first, second, weights, group, num_experts):
    """The block on two micro-batches, with ops in flight; all share one channel, in this order."""
    options = {"group": group, "num_experts": num_experts}
    first = attention(first, weights)
    to_first = jax_ep.dispatch_start(*route(first, weights), **options)
    second = attention(second, weights)
    to_second = jax_ep.dispatch_start(*route(second, weights), after=to_first, **options)
    out = jax_ep.dispatch_done(to_first)
    rows = experts(out, weights, to_second.free_sms)
    home_first = jax_ep.combine_start(rows, out.handle, group=group, after=to_second)
    out = jax_ep.dispatch_done(to_second)
    rows = experts(out, weights, home_first.free_sms)
    home_second = jax_ep.combine_start(rows, out.handle, group=group, after=home_first)
    return first + jax_ep.combine_done(home_first), second + jax_ep.combine_done(home_second)


# [end]


def block_in_line(first, second, weights, group, num_experts):
    """The same, one op after the other."""
    results = []
    for x in first, second:
        x = attention(x, weights)
        out = jax_ep.dispatch(*route(x, weights), group=group, num_experts=num_experts)
        results.append(x + jax_ep.combine(experts(out, weights), out.handle, group=group))
    return tuple(results)


def make_step(block, mesh, group, num_experts, rate=0.05):
    """A training step: ``(weights, first, second)`` to new weights and the loss."""
    of_experts = ("gate", "up", "down")

    def loss_fn(weights, first, second):
        ys = block(first, second, weights, group, num_experts)
        return sum(jnp.square(y.astype(jnp.float32) - 1).mean() for y in ys)

    def step(weights, first, second):
        loss, grads = jax.value_and_grad(loss_fn)(weights, first, second)
        # A collective of XLA's own; without one, XLA hides nothing before jaxlib 0.12.
        shared = {name: g for name, g in grads.items() if name not in of_experts}
        grads |= jax.lax.psum(shared, "expert")
        weights = jax.tree.map(lambda w, g: (w - rate * g).astype(w.dtype), weights, grads)
        return weights, jax.lax.pmean(loss, "expert")

    specs = {name: P("expert") if name in of_experts else P() for name in init_names()}
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, P("expert"), P("expert")),
        out_specs=(specs, P()),
        check_vma=False,
    )
    return jax.jit(mapped), specs


def init_names():
    """Names of the weights."""
    shapes = jax.eval_shape(
        functools.partial(init, hidden=8, width=8, num_experts=1, dtype=jnp.float32),
        jax.random.key(0),
    )
    return list(shapes)


def main() -> None:
    """Train both forms of the block, and compare them."""
    parser = argparse.ArgumentParser(description="ops in flight beside attention and experts")
    parser.add_argument("--tokens", type=int, default=64, help="of a rank and micro-batch")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="of an expert")
    parser.add_argument("--experts", type=int, default=2, help="of a rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", help="a folder for a profile of one step of each")
    options = parser.parse_args()

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    group = jax_ep.create_group(mesh, "expert")
    num_experts = options.experts * group.size
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    weights = init(
        jax.random.key(0),
        hidden=options.hidden,
        width=options.width,
        num_experts=num_experts,
        dtype=dtype,
    )
    shape = (options.tokens * group.size, options.hidden)
    batches = [jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (1, 2)]
    batches = [jax.device_put(x, NamedSharding(mesh, P("expert"))) for x in batches]
    print(f"2 micro-batches of {shape[0]} tokens, {num_experts} experts, on {group}")
    losses = {}
    for name, block in {"in line": block_in_line, "in flight": block_in_flight}.items():
        step, specs = make_step(block, mesh, group, num_experts)
        state = {
            key: jax.device_put(w, NamedSharding(mesh, specs[key])) for key, w in weights.items()
        }
        state, loss = step(state, *batches)
        losses[name] = [float(loss)]
        begin = time.perf_counter()
        for _ in range(options.steps - 1):
            state, loss = step(state, *batches)
            losses[name].append(float(loss))
        group.check()
        took = (time.perf_counter() - begin) / max(options.steps - 1, 1)
        print(f"{name:9}: {took * 1e3:8.2f} ms a step, losses {losses[name]}")
        if options.profile:
            folder = os.path.join(options.profile, name.replace(" ", "_"))
            with jax.profiler.trace(folder):
                jax.block_until_ready(step(state, *batches))
    same = losses["in line"] == losses["in flight"]
    print("the losses are the same bits" if same else "THE LOSSES DIFFER")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
