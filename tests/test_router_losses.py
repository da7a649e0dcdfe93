"""The router z-loss and the sequence-wise balancing loss, alone and as the layer reports them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing

by_itself = pytest.mark.one_process("calls the losses with arrays of one process")

E, K = 8, 2
IDX = jnp.zeros((4, K), jnp.int32)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def z_loss(logits, mask) -> float:
    """By its definition, in float64."""
    rows = np.float64(logits)[np.asarray(mask)]
    return float(np.mean(np.log(np.exp(rows).sum(axis=1)) ** 2)) if len(rows) else 0.0


def sequence_loss(topk_idx, scores, sequence_idx) -> float:
    """By its definition, a loop over sequences, tokens and experts."""
    losses = []
    for s in np.unique(sequence_idx):
        mine = [t for t in np.flatnonzero(sequence_idx == s) if np.any(topk_idx[t] >= 0)]
        if not mine:
            continue
        experts = scores.shape[1]
        chosen = [e for t in mine for e in topk_idx[t] if e >= 0]
        share = np.float64(scores[mine]) / np.float64(scores[mine]).sum(axis=1, keepdims=True)
        losses.append(
            sum(
                experts * chosen.count(e) / len(chosen) * share[:, e].mean() for e in range(experts)
            )
        )
    return float(np.mean(losses)) if losses else 0.0


# ---- z-loss


@by_itself
def test_z_loss_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 1.0], [0.5, 0.25, 0.25], [np.e, np.e, 0.0]]))
    want = (np.log(4) ** 2 + 0 + (1 + np.log(2)) ** 2) / 3
    np.testing.assert_allclose(routing.router_z_loss(logits), want, rtol=1e-6)
    of_two = routing.router_z_loss(logits, num_used_experts=2)
    want = (np.log(3) ** 2 + np.log(0.75) ** 2 + (1 + np.log(2)) ** 2) / 3
    np.testing.assert_allclose(of_two, want, rtol=1e-6)
    masked = routing.router_z_loss(logits, mask=jnp.array([True, True, False]))
    np.testing.assert_allclose(masked, np.log(4) ** 2 / 2, rtol=1e-6)
    assert routing.router_z_loss(logits, mask=jnp.zeros(3, bool)) == 0
    assert routing.router_z_loss(logits[:0]) == 0


@by_itself
def test_z_loss_of_masked_tokens_reaches_no_gradient():
    logits = jnp.asarray(draw(0, 6, E))
    mask = jnp.arange(6) != 2

    def loss(logits):
        return routing.router_z_loss(logits, mask=mask)

    want, d_want = jax.value_and_grad(loss)(logits)
    found, d_found = jax.value_and_grad(loss)(logits.at[2].set(jnp.nan))
    np.testing.assert_allclose(want, z_loss(logits, mask), rtol=1e-5)
    assert found == want and not np.any(d_found[2])
    np.testing.assert_array_equal(d_found, d_want)
    # d = 2 logsumexp softmax / tokens
    lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    by_hand = jnp.where(mask[:, None], 2 * lse * jax.nn.softmax(logits) / 5, 0)
    np.testing.assert_allclose(d_want, by_hand, rtol=1e-5, atol=1e-7)


@by_itself
@pytest.mark.parametrize("masked", [False, True])
def test_losses_over_a_mesh(masked):
    """Ranks have parts of sequences, and different numbers of tokens that count."""
    mesh = spmd.make_mesh(spmd.fit((2, 2), ("a", "b"), "b"), ("a", "b"))
    tokens = 6 * mesh.size
    logits = jnp.asarray(draw(1, tokens, E))
    mask = np.arange(tokens) % 11 > 3 if masked else np.ones(tokens, bool)
    mask[10:15] = not masked  # with a mask, one sequence has no token
    sequence_idx = np.arange(tokens) // 5
    num_sequences = int(sequence_idx[-1]) + 1
    topk_idx = np.where(mask[:, None], jax.lax.top_k(logits, K)[1], -1)

    def losses(logits, mask, topk_idx, sequence_idx, axis_names=()):
        z = routing.router_z_loss(logits, mask=mask if masked else None, axis_names=axis_names)
        scores = jax.nn.sigmoid(logits)
        balance = routing.sequence_balancing_loss(
            topk_idx, scores, sequence_idx, num_sequences, axis_names=axis_names
        )
        return jnp.stack([z, balance])

    local = functools.partial(losses, axis_names=("a", "b"))
    over_mesh = spmd.shard(local, mesh, out_specs=P())
    arguments = tuple(map(jnp.asarray, (mask, topk_idx, sequence_idx)))
    for part in (0, 1):
        step = lambda f, part=part: jax.jit(  # noqa: E731
            jax.value_and_grad(lambda logits, *rest: f(logits, *rest)[part])
        )
        want, d_want = step(losses)(logits, *arguments)
        got, d_got = step(over_mesh)(logits, *arguments)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert np.abs(d_want).max() > 0
        np.testing.assert_allclose(d_got, d_want, rtol=1e-5, atol=1e-8)
    z, balance = losses(logits, *arguments)
    np.testing.assert_allclose(z, z_loss(logits, mask), rtol=1e-5)
    scores = np.asarray(jax.nn.sigmoid(logits))
    np.testing.assert_allclose(balance, sequence_loss(topk_idx, scores, sequence_idx), rtol=1e-5)


# ---- sequence-wise balancing loss


@by_itself
def test_sequence_loss_by_hand():
    """Each of two sequences uses one expert of two; together they use both evenly."""
    topk_idx = jnp.array([[0], [0], [1], [1]], jnp.int32)
    scores = jnp.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.6], [0.1, 0.9]])
    found = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(found, (2 * 0.8 + 2 * (0.75 + 0.9) / 2) / 2, rtol=1e-6)
    whole = routing.sequence_balancing_loss(topk_idx, scores, jnp.zeros(4, jnp.int8), 1)
    np.testing.assert_allclose(whole, routing.load_balancing_loss(topk_idx, scores), rtol=1e-6)
    # A third sequence without tokens changes nothing, nor do tokens of no sequence.
    with_empty = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, 2, 2]), 3)
    assert with_empty == found
    outside = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, -1, 7]), 2)
    np.testing.assert_allclose(outside, 2 * 0.8, rtol=1e-6)
    nothing = routing.sequence_balancing_loss(jnp.full((4, 1), -1), scores, jnp.zeros(4, int), 2)
    assert nothing == 0


@by_itself
def test_sequence_loss_of_the_experts_that_exist():
    scores, idx = np.abs(draw(2, 12, E)), np.random.default_rng(3).integers(0, 6, (12, K))
    sequences = np.arange(12) // 4

    def loss(idx):
        arrays = map(jnp.asarray, (idx, scores, sequences))
        return routing.sequence_balancing_loss(*arrays, 3, num_used_experts=6)

    found = loss(idx)
    np.testing.assert_allclose(found, sequence_loss(idx, scores[:, :6], sequences), rtol=1e-5)
    padded = np.where(idx == 5, 7, idx)  # a route to an expert that does not exist is none
    want = sequence_loss(np.where(idx == 5, -1, idx), scores[:, :6], sequences)
    np.testing.assert_allclose(loss(padded), want, rtol=1e-5)


@by_itself
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: routing.router_z_loss(x, num_used_experts=9),
            ValueError,
            "router_z_loss: argument num_used_experts: expected 1 to 8, the number of logits, got 9",
        ),
        (
            lambda x: routing.router_z_loss(x, mask=jnp.ones(5, bool)),
            ValueError,
            r"router_z_loss: argument mask: expected shape \(4,\), one .*, got \(5,\); reshape",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(3, int), 1),
            ValueError,
            r"sequence_idx: expected shape \(4,\), .*got \(3,\); give each token the index",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4, int), 1.0),
            TypeError,
            "num_sequences: expected a Python int, got float; pass how many",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4), 1),
            TypeError,
            "sequence_idx: expected an array of an integer dtype, got float32; cast",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4, int), -1),
            ValueError,
            "num_sequences: expected 0 or more, got -1; pass",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=rf"jax_ep\.routing\..*{text}"):
        call(jnp.zeros((4, E)))


# ---- what the layer reports

H, F = 8, 4


def make_params(experts: int = E) -> jax_ep.MoEParams:
    sizes = {"hidden": H, "intermediate": F, "num_experts": experts}
    return jax_ep.init_moe_params(jax.random.key(0), **sizes)


def make_group(backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def dense_losses(x, router_kernel, mask, *, router, used=E):
    """Both losses of all tokens, on one device."""
    tokens, present = x.reshape(-1, H), jnp.ones(x.shape[:-1], bool) if mask is None else mask
    present = present.reshape(-1)
    logits = (jnp.where(present[:, None], tokens, 0) @ router_kernel)[:, :used]
    z = jnp.where(present, jax.nn.logsumexp(logits, axis=1) ** 2, 0).sum() / present.sum()
    scores = router(logits, K).scores
    shares = scores / scores.sum(axis=1, keepdims=True)
    best = jax.nn.one_hot(jax.lax.top_k(scores, K)[1], used).sum(axis=1)
    shape = (-1, x.shape[-2], used)
    weight = present.reshape(-1, x.shape[-2])[..., None]
    count = weight.sum(axis=1)
    per = jnp.maximum(count, 1)
    f = used * (best.reshape(shape) * weight).sum(axis=1) / (per * K)
    p = (shares.reshape(shape) * weight).sum(axis=1) / per
    return jnp.stack([z, (f * p).sum() / (count[:, 0] > 0).sum()])


@pytest.mark.needs_collectives
@pytest.mark.usefixtures("in_float32")
@by_itself
@pytest.mark.parametrize(
    ("shape", "masked", "axis_type", "options"),
    [
        ((3, 5, H), True, AxisType.Auto, {}),
        ((3, 5, H), False, AxisType.Explicit, {"num_used_experts": 6}),
        ((2, 2, 3, H), True, AxisType.Explicit, {"overlap": "chunks"}),
        ((7, H), True, AxisType.Auto, {"num_used_experts": 6}),
    ],
)
def test_losses_of_the_layer(shape, masked, axis_type, options, native_backend):
    """Sequences are cut between ranks, one has no token, and some tokens are padding of the mesh."""
    group = make_group(native_backend, axis_type)
    params = make_params()
    params = params._replace(router_bias=jnp.linspace(-0.3, 0.3, E))  # moves no loss
    x = jax.random.normal(jax.random.key(1), shape)
    mask = None
    if masked:
        mask = jnp.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % 4 != 1
        mask = mask.at[(0,) * (len(shape) - 2)].set(mask.ndim == 1)
    router = routing.Router("sigmoid")
    used = options.get("num_used_experts", E)
    if masked:
        x = jnp.where(mask[..., None], x, jnp.nan)

    def losses(x, kernel):
        _, aux = jax_ep.moe(
            x,
            params._replace(router_kernel=kernel),
            group=group,
            num_experts=E,
            top_k=K,
            router=router,
            mask=mask,
            sequence_loss=True,
            **options,
        )
        return jnp.stack([aux.z_loss, aux.sequence_loss])

    dense = functools.partial(dense_losses, mask=mask, router=router, used=used)
    got, pull = jax.vjp(jax.jit(losses), x, params.router_kernel)
    want, pull_dense = jax.vjp(lambda x, kernel: dense(x, kernel), x, params.router_kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for cotangent in jnp.eye(2):
        (d_x, d_kernel), (want_x, want_kernel) = (f(cotangent) for f in (pull, pull_dense))
        assert np.abs(want_kernel).max() > 1e-3
        np.testing.assert_allclose(d_kernel, want_kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(d_x, want_x, rtol=1e-4, atol=1e-6)


@pytest.mark.needs_collectives
@pytest.mark.usefixtures("in_float32")
@by_itself
def test_losses_in_scan_remat_and_an_outer_shard_map(native_backend):
    """Each stage reports the losses of its own tokens, and its router gets their gradients."""
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names)
    group = jax_ep.create_group(mesh, "expert", backend=native_backend)
    params, stages = make_params(), mesh.shape["stage"]
    x = jax.random.normal(jax.random.key(2), (stages, 3, 5, H))
    router = routing.Router()

    def layer(x, kernel):
        aux = jax_ep.moe(
            x,
            params._replace(router_kernel=kernel),
            group=group,
            num_experts=E,
            top_k=K,
            sequence_loss=True,
        )[1]
        return jnp.stack([aux.z_loss, aux.sequence_loss])

    def stage(x, kernel):
        def body(total, _):
            return total + jax.checkpoint(layer)(x[0], kernel), None

        start = jax.lax.pcast(jnp.zeros(2), "stage", to="varying")
        return jax.lax.scan(body, start, None, length=2)[0][None]

    run = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(P("stage"), P()),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def dense(x, kernel):
        one = functools.partial(dense_losses, mask=None, router=router)
        return 2 * jnp.stack([one(part, kernel) for part in x])

    weights = jnp.arange(1.0, 1 + 2 * stages).reshape(stages, 2)
    step = lambda f: jax.value_and_grad(  # noqa: E731
        lambda *a: jnp.sum(f(*a) * weights), argnums=(0, 1)
    )
    got, gradients = jax.jit(step(run))(x, params.router_kernel)
    want, want_gradients = step(dense)(x, params.router_kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.needs_collectives
@by_itself
def test_losses_of_no_token(native_backend):
    group = make_group(native_backend)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, sequence_loss=True)
    for shape in ((0, 5, H), (3, 0, H), (0, H)):
        aux = layer(jnp.zeros(shape), make_params())[1]
        assert aux.z_loss == 0 and aux.sequence_loss == 0 and aux.aux_loss == 0
    aux = layer(jnp.ones((2, 3, H)), make_params(), mask=jnp.zeros((2, 3), bool))[1]
    assert aux.z_loss == 0 and aux.sequence_loss == 0


@pytest.mark.needs_collectives
@by_itself
def test_a_program_pays_only_for_the_losses_it_takes(native_backend):
    """The default has no sums of sequences, and XLA drops a z-loss that nothing reads."""
    group = make_group(native_backend)
    x, params = jnp.ones((3, 5, H)), make_params()

    def compiled(take, **options):
        def run(x, params):
            y, aux = jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, **options)
            return y, take(aux)

        return jax.jit(run).lower(x, params).compile().as_text()

    all_reduces = lambda text: text.count(" all-reduce(")  # noqa: E731
    loads = compiled(lambda aux: aux.load)
    assert "log(" not in loads and "logsumexp" not in loads
    with_z = compiled(lambda aux: aux.z_loss)
    assert "logsumexp" in with_z or "log(" in with_z
    sums = f"f32[3,{E}]"  # of each of three sequences
    assert sums not in compiled(lambda aux: aux)
    with_sequences = compiled(lambda aux: aux, sequence_loss=True)
    assert sums in with_sequences
    assert all_reduces(loads) < all_reduces(with_sequences)


@pytest.mark.needs_collectives
@by_itself
def test_flax_layers_report_them(native_backend):
    group, x = make_group(native_backend), jnp.ones((3, 5, H))
    settings = {"num_experts": E, "top_k": K, "group": group, "sequence_loss": True}
    layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
    variables = {"params": nnx.to_pure_dict(nnx.state(layer))}
    of_linen = jax_ep.linen.MoE(H, F, **settings).apply(variables, x)[1]
    of_nnx = layer(x)[1]
    want = jax_ep.moe(x, layer.params(), **settings)[1]
    for name in ("z_loss", "sequence_loss"):
        assert getattr(want, name) > 0
        assert getattr(of_nnx, name) == getattr(of_linen, name) == getattr(want, name)
    with pytest.raises(
        TypeError, match=r"jax_ep.moe: argument sequence_loss: expected True .* int"
    ):
        jax_ep.moe(x, layer.params(), **settings | {"sequence_loss": 1})
