"""``jax_ep.moe``: a whole mixture-of-experts layer over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._core.noise import seed_of
from jax_ep._core.types import DispatchConfig, Dispatched, DropPolicy, ScaleFormat
from jax_ep._groups.group import Group
from jax_ep._moe import checks, router_checks
from jax_ep._moe.activations import Activation
from jax_ep._moe.exchange import Exchanged, exchange
from jax_ep._moe.experts import Beside, GroupedDot, shared_inner, shared_outputs
from jax_ep._moe.local_experts import LocalExperts
from jax_ep._moe.nested import nested_shard_map
from jax_ep._moe.of_tokens import OfTokens, zero_masked
from jax_ep._moe.own_experts import ExpertFunction
from jax_ep._moe.param_checks import check_experts
from jax_ep._moe.params import MoEParams
from jax_ep._moe.placement import join_tokens, place, split_tokens
from jax_ep._moe.report import MoEAux, Parts, Sequences, report, report_of_no_token
from jax_ep._moe.router import AnyRouter, Noise, RouterLike, replay, resolve_router, route
from jax_ep._moe.tensor_axis import add_parts, vary
from jax_ep._moe.tensor_checks import check_axis, check_not_entered
from jax_ep._moe.token_axes import resolve_token_axes
from jax_ep._ops import checks as op_checks
from jax_ep.routing import Routing

Overlap = Literal["shared_expert", "chunks"]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The static arguments of a call, hashable; see ``moe``."""

    group: Group
    num_experts: int
    top_k: int
    num_used_experts: int
    router: AnyRouter
    token_axes: tuple[str, ...]
    tensor_axis: str | None
    experts: LocalExperts
    overlap: Overlap | None
    num_chunks: int
    parts: Parts
    dispatch: tuple[tuple[str, Any], ...]


def moe(
    x: Float[Array, "*batch hidden"],
    params: MoEParams,
    *,
    group: Group,
    num_experts: int,
    top_k: int,
    router: RouterLike = "softmax",
    token_axes: tuple[str, ...] | None = None,
    tensor_axis: str | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    router_inputs: Any = None,
    router_key: PRNGKeyArray | None = None,
    routing: Routing | None = None,
    num_used_experts: int | None = None,
    sequence_loss: bool = False,
    return_routing: bool = False,
    grouped_dot: GroupedDot | None = None,
    experts: ExpertFunction | None = None,
    expert_specs: Any = None,
    overlap: Overlap | None = None,
    num_chunks: int = 2,
    activation: Activation = jax.nn.silu,
    alignment: int = 1,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    rank_capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    quantization: Literal["fp8"] | None = None,
    scale_format: ScaleFormat = "f32",
    config: DispatchConfig | None = None,
) -> tuple[Float[Array, "*batch hidden"], MoEAux]:
    """Send each token to its top-k experts and sum their outputs.

    In pseudocode, for every token::

        routing = router(token @ router_kernel, router_bias)             # in float32
        for e, weight in zip(routing.topk_idx, routing.topk_weights):
            inner = activation(token @ gate[e] + gate_bias[e]) * (token @ up[e] + up_bias[e])
            y += weight * (inner @ down[e] + down_bias[e])
        y += the same with the shared expert, unweighted

    Call it on whole (global) arrays, inside ``jit`` or not, on meshes with Auto or Explicit axes. It
    splits the tokens over ``token_axes`` (adding masked ones where they do not split evenly) and
    enters ``shard_map`` over the whole mesh of the group, where ``dispatch`` and ``combine`` move the
    rows. Ranks along other axes work on the same tokens. ``x`` may be sharded in any way over the mesh
    of the group; where it is split over the leading token axes in their order, as a batch over "data"
    is, every device works on a part of what it has, and only the outputs are gathered again.

    It also works inside a ``shard_map`` over other axes than the group's, such as the "stage" axis
    of a pipeline. Then tokens and statistics are those of one position along these axes. Reverse
    mode works there. Forward mode (``jax.jvp``), which works elsewhere, is a ``TypeError`` there when
    the program is lowered, and policies of ``jax.checkpoint`` see the layer as one op.

    On GPUs, a failed op gives NaN and may raise no error, for example if a rank never arrives. So
    call ``group.check()`` where you wait for results: it raises the ``CommunicationError``.

    Example::

        mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        group = jax_ep.create_group(mesh, "expert")
        params = jax_ep.init_moe_params(key, hidden=512, intermediate=1024, num_experts=16)
        y, aux = jax_ep.moe(x, params, group=group, num_experts=16, top_k=2)
        loss = task_loss(y) + 0.01 * aux.aux_loss

    Args:
        x: ``[..., H]`` bf16, f16 or f32. The layer computes in its dtype, whatever the dtype of the
            weights. Rows are a multiple of 16 bytes.
        params: The weights, over all experts; ``moe_partition_specs`` says how to shard them.
        group: The group, from ``create_group``.
        num_experts: E over the whole group; a multiple of its size.
        top_k: Experts of each token.
        router: "softmax", "sigmoid", a ``routing.Router`` with settings, or a function of your own,
            ``(logits, bias)`` to ``routing.Routing``; see below.
        token_axes: Mesh axes that tokens are split over; those of the group must be among them. None
            takes all axes of the mesh, those of the group last, but for axes that an enclosing
            ``shard_map`` has entered and for those whose names stand for tensor or pipeline
            parallelism: "tensor", "model", "tp", "mp", "stage", "stages", "pipeline", "pipe", "pp".
            Ranks along the latter repeat the work, which a warning says once, and along
            ``tensor_axis``, which is never among them, they divide it.
        tensor_axis: A mesh axis that divides F of the experts and S of the shared expert, multiples
            of its size. Positions along it have the same tokens, and send them to their groups each
            for itself. Each computes with its part of the inner channels, and the outputs are added
            over the axis in the dtype of ``x``. The activation works channel by channel. No weight is
            gathered if it is split as ``moe_partition_specs(tensor_axis=)`` says. None: no such axis.
        mask: Boolean, the shape of ``x`` without H. A token with False is set to zero before
            anything reads it, so even NaN in it does no harm. It goes to no expert and is in no
            statistics and no gradient. Its output is that of the shared expert for zeros, which is
            zero.
        router_inputs: What a router function needs besides the logits, such as the ids of the
            tokens: a pytree of arrays whose shapes begin with that of ``x`` without H.
        router_key: Key of ``jax.random`` for the noise of a ``Router`` with ``noise_std``, one for each
            layer and step. None adds no noise, which is what evaluation wants. The noise of a token
            follows from the key and the token's place in the batch, so it is the same on any mesh.
            Inside an enclosing ``shard_map``, fold its ``axis_index`` into the key.
        routing: Routes to take in place of the router's, such as those of an earlier run
            (``MoEAux.routing``): ``topk_idx`` ``[..., K]`` of any integer dtype, −1 for no expert,
            ``topk_weights`` ``[..., K]`` in float32, bfloat16 or float16, and ``scores`` ``[..., E]``
            or None, all beginning with the shape of ``x`` without H. Gradients of weights and scores
            flow to these arrays, and ``router_kernel`` gets none. Without scores there is no
            ``aux_loss``, and there never is a ``z_loss``; both are then None. To replay the choice
            alone, with weights from the router of today, pass the ids as ``router_inputs`` to a
            router function that weights them by its logits.
        num_used_experts: Only this many experts exist, those with the lowest ids. The others only
            make ``num_experts`` a multiple of the group's size: they are never chosen and are left
            out of ``aux_loss``, and their weights have gradient zero. ``capacity_factor`` still
            counts ``num_experts``. None: all exist.
        sequence_loss: Also report ``MoEAux.sequence_loss``. The second-to-last dimension of ``x`` is
            that of a sequence, wherever the mesh cuts it; tokens ``[T, H]`` are one sequence. All
            ranks then sum ``2 E`` numbers for each sequence.
        return_routing: Also report ``MoEAux.routing`` and ``MoEAux.logits``.
        grouped_dot: Replaces ``jax_ep.grouped_dot``. Only the default leaves SMs to ops in flight, so a
            function of your own that occupies all SMs of a GPU hides no op. Its rows past the last
            group, and their cotangents, are zeros. Those of the default, which reads none of them,
            are undefined, so that GPUs need not clear them.
        experts: Experts of your own, an ``ExpertFunction``, whose weights are ``params.experts``.
            They leave SMs to ops in flight only where they pass ``num_sms`` to ``grouped_dot``.
        expert_specs: How ``params.experts`` is split over the mesh: a pytree of ``PartitionSpec``, or
            one for all leaves of a part of it. None splits the first dimension, E, over the group.
        overlap: What XLA may compute while rows are in flight, always in mode "throughput".
            "shared_expert": the shared expert. "chunks": also the experts, for another chunk of this
            rank's tokens, forward and backward. On GPUs these experts leave SMs to the ops beside them:
            the first grouped products of each pass, as many of them as take about the time of the ops.
            And ops beside experts take 24 SMs, unless ``config`` gives a number. The matmuls of the
            shared expert are XLA's, and take all SMs.
        num_chunks: For "chunks": into how many chunks the tokens of a rank are split, 2 or more. More
            of them hide more, but read the experts' weights more often, add their gradients, and each
            costs the fixed times of two ops. On H200s of one host that costs more than it hides, so
            take chunks where rows cross a network. XLA hides ops only in programs that hold one of its
            own collectives, as layers over several ranks do. Where no row is dropped, outputs and the
            gradient of ``x`` are those without chunks. The gradients of the experts' weights are sums
            over chunks, each rounded to the dtype of ``x`` first. ``aux_loss`` and the statistics are
            those of all tokens.
        activation: Activation function of the gate, or of ``up`` where experts have no gate; or of
            both, a ``GatedActivation``. That of the shared expert too.
        alignment: Rows of each expert are padded to a multiple of it, if ``grouped_dot`` needs that.
        capacity: As in ``dispatch``, rows of each rank. Each chunk has the share of its tokens,
            rounded up to ``alignment``, and rows that do not fit into one find no room in another.
        capacity_factor: As in ``dispatch``, bounds the rows of each expert; in each chunk by its
            number of tokens.
        rank_capacity_factor: As in ``dispatch``, bounds the rows of each rank; likewise. 1.25, say,
            bounds memory with few rows lost: buffers have 1.25 times the rows of even routing.
        drop_policy: As in ``dispatch``; "score" keeps the rows with the highest top-k weights.
        quantization: As in ``dispatch``: "fp8" sends rows in 8 bits (and back in the dtype of
            ``x``); gradients are straight-through. H is a multiple of 128.
        scale_format: As in ``dispatch``.
        config: As in ``dispatch``.

    A router function runs on each rank. It gets the logits ``[T, E]`` float32 of this rank's tokens,
    the bias ``[E]`` or None (both of the experts that exist) and, if there are ``router_inputs``,
    those of these tokens as a third argument, each ``[T, ...]``. Masked tokens, and those that were
    added to split the tokens evenly, are zeros there. It gives ids of any integer dtype, −1 for no
    expert, weights in float32, bfloat16 or float16, and scores of the shape of the logits::

        def by_hash(logits, bias, token_ids):
            idx = (token_ids[:, None] + jnp.arange(2)) % logits.shape[1]
            return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))

        y, aux = jax_ep.moe(..., top_k=2, router=by_hash, router_inputs=token_ids)

    It may close over Python values and over arrays that are the same for all tokens, such as a
    temperature or a table ``[E]``. These arrays may be traced and get their gradient. It must not
    close over arrays of tokens, because these would not be split: pass them as ``router_inputs``.
    JAX keeps a program for each router, which it finds by hash and equality, and reads the values
    that the router closes over only when it makes that program. So do not change a router between
    calls, because the old program would run. Make a new router instead, but not in every call,
    because each new one is traced again.

    Returns:
        ``[..., H]`` in the dtype of ``x``, and the statistics.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for any other argument that does not fit; the text says what would. Arrays on
            other devices are such arguments, and so are arrays on a mesh that divides the same
            devices in another way. Inside ``jit``, ``moe`` cannot see where arrays lie, and XLA may
            end the process if they lie on such a mesh.
    """
    op = "moe"
    checks.check_group(group)
    op_checks.check_num_experts(op, num_experts, group)
    checks.check_num_used(op, num_used_experts, num_experts)
    checks.check_top_k(top_k, num_used_experts or num_experts)
    checks.check_x(x)
    check_axis(op, tensor_axis, group)
    check_not_entered(tensor_axis)
    local_experts = LocalExperts(activation, grouped_dot, experts, tensor_axis)
    local_experts = check_experts(
        params, x.shape[-1], num_experts, group, local_experts, expert_specs
    )
    checks.check_overlap(overlap, num_chunks, params.shared)
    checks.check_mask(mask, x.shape[:-1])
    resolved = resolve_router(router)
    arrays = {"router_inputs": router_inputs, "router_key": router_key, "routing": routing}
    parts = Parts.of(routing, sequence_loss=sequence_loss, return_routing=return_routing)
    router_checks.check_call(resolved, parts, x.shape[:-1], top_k, num_experts, **arrays)
    checks.check_placement(group, x=x, params=params, mask=mask, **arrays)
    options: dict[str, Any] = {
        "alignment": alignment,
        "capacity": capacity,
        "capacity_factor": capacity_factor,
        "rank_capacity_factor": rank_capacity_factor,
        "drop_policy": drop_policy,
        "quantization": quantization,
        "scale_format": scale_format,
        "config": config,
    }
    checks.check_dispatch_options(**options)
    settings = _Settings(
        group=group,
        num_experts=num_experts,
        top_k=top_k,
        num_used_experts=num_used_experts or num_experts,
        router=resolved,
        token_axes=resolve_token_axes(token_axes, group, tensor_axis),
        tensor_axis=tensor_axis,
        experts=local_experts,
        overlap=overlap,
        num_chunks=num_chunks if overlap == "chunks" else 1,
        parts=parts,
        dispatch=tuple(options.items()),
    )
    return _over_mesh(settings, x, params, mask, **arrays)


@functools.partial(jax.jit, static_argnums=0)  # op by op, a call outside jit would take seconds
def _over_mesh(
    settings: _Settings,
    x: Float[Array, "*batch hidden"],
    params: MoEParams,
    mask: Bool[Array, "*batch"] | None,
    *,
    router_inputs: Any,
    router_key: PRNGKeyArray | None,
    routing: Routing | None,
) -> tuple[Float[Array, "*batch hidden"], MoEAux]:
    """Split tokens and weights over the mesh, and run the layer on every device."""
    manual, axes = _compat.manual_axes(), settings.token_axes
    mesh = _compat.context_mesh() if manual else settings.group.mesh
    batch = x.shape[:-1]
    if x.size == 0:
        sizes = {"num_experts": settings.num_experts, "top_k": settings.top_k}
        return jnp.zeros_like(x), report_of_no_token(settings.parts, batch, **sizes)
    tokens = split_tokens(x, mesh, axes)
    arguments.check_rows("moe", "x", tokens)
    if mask is None and tokens.shape[0] != math.prod(batch):
        mask = jnp.ones(batch, bool)
    if mask is not None:
        mask = split_tokens(mask[..., None], mesh, axes)
    split = functools.partial(split_tokens, mesh=mesh, axes=axes, num_batch=len(batch))
    given = OfTokens(mask, *jax.tree.map(split, (router_inputs, routing)))
    seed = None if router_key is None else place(seed_of(router_key), mesh, PartitionSpec())
    param_specs = settings.experts.partition_specs(params, settings.group)
    params = jax.tree.map(lambda p, spec: place(p, mesh, spec), params, param_specs)
    of_tokens: Any = PartitionSpec(axes)
    everywhere: Any = PartitionSpec()
    of_given = jax.tree.map(lambda _: of_tokens, given)
    in_specs = (of_tokens, param_specs, of_given, None if seed is None else everywhere)
    out_specs = (of_tokens, settings.parts.fill(everywhere, everywhere, of_tokens))
    on_one_rank = functools.partial(_on_one_rank, settings, Sequences.of(x.shape))
    if manual:
        rest = [name for name in mesh.axis_names if name not in manual]
        run = nested_shard_map(on_one_rank, axes=rest, in_specs=in_specs, out_specs=out_specs)
    else:
        run = jax.shard_map(on_one_rank, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    y, aux = run(tokens, params, given, seed)
    join = functools.partial(join_tokens, like=x, mesh=mesh, channels=False)
    routes, logits = jax.tree.map(join, (aux.routing, aux.logits))
    return join_tokens(y, x, mesh), aux._replace(routing=routes, logits=logits)


def _on_one_rank(
    settings: _Settings,
    sequences: Sequences,
    x: Float[Array, "tokens hidden"],
    params: MoEParams,
    given: OfTokens,
    seed: UInt32[Array, "2"] | None,
) -> tuple[Float[Array, "tokens hidden"], MoEAux]:
    """The layer for this rank's tokens and this rank's experts."""
    mask, token_idx = given.mask, None
    if mask is not None:
        # A masked token may hold NaN, which must not reach the gradient of any weight.
        x, given = jax.tree.map(functools.partial(zero_masked, mask), (x, given))
    if seed is not None or settings.parts.sequence_loss:
        first = lax.axis_index(settings.token_axes) * len(x)
        token_idx = first + jnp.arange(len(x), dtype=jnp.int32)
    sizes: dict[str, Any] = {"num_experts": settings.num_experts}
    sizes["num_used_experts"] = settings.num_used_experts
    if given.routing is not None:
        routing, logits = replay(given.routing, **sizes)
    else:
        noise = None if seed is None or token_idx is None else Noise(seed, token_idx)
        from_these = (x, params.router_kernel, params.router_bias, given.router_inputs, noise)
        routing, logits = route(settings.router, *from_these, top_k=settings.top_k, **sizes)
    topk_idx = routing.topk_idx if mask is None else jnp.where(mask, routing.topk_idx, -1)
    x, topk_weights = vary((x, routing.topk_weights), settings.tensor_axis)
    inner = None
    if params.shared is not None:
        inner = shared_inner(x, params.shared, settings.experts.activation)

    def experts(out: Dispatched, beside: Beside) -> Array:
        nonlocal inner
        if settings.overlap == "shared_expert":
            # So the first half of the shared expert comes before the experts, which leaves it no
            # better place than beside the dispatch; the second half is for the combine.
            tokens, inner = lax.optimization_barrier((out.tokens, inner))
            out = dataclasses.replace(out, tokens=tokens)
        return settings.experts.apply(out, params, beside)

    out = exchange(
        x,
        topk_idx,
        topk_weights,
        experts,
        in_flight=settings.overlap is not None,
        num_chunks=settings.num_chunks,
        unused_rows=settings.experts.unused_rows,
        group=settings.group,
        num_experts=settings.num_experts,
        **dict(settings.dispatch),
    )
    if params.shared is not None:
        assert inner is not None
        out = out._replace(y=out.y + shared_outputs(inner, params.shared))
    out = Exchanged(*add_parts(*out, tensor_axis=settings.tensor_axis))
    aux = report(
        out.topk_idx,  # the handle's: those of a custom router, less the invalid ones
        routing,
        logits,
        None if mask is None else mask[:, 0],
        num_dropped=out.num_dropped,
        num_invalid=out.num_invalid,
        axis_names=settings.token_axes,
        parts=settings.parts,
        sequences=sequences,
        token_idx=token_idx,
        **sizes,
    )
    return out.y, aux
