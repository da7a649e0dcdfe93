"""What ``jax_ep.moe`` refuses of experts and their weights, in a text that says what would fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd

pytestmark = pytest.mark.one_process("calls the layer with arrays of one process")

H, F, E, K, S = 8, 12, 4, 2, 8
SWIGLU = jax_ep.clamped_swiglu()
V, T = ValueError, TypeError
UP = jnp.ones((E, H, F))


def call(params, **options):
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((1, 2), names), names)
    group = spmd.create_group(mesh, "expert", backend="reference")
    jax_ep.moe(jnp.ones((4, H)), params, group=group, num_experts=E, top_k=K, **options)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *args):
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("weights", "arguments", "error", "text"),
    [
        ({"gate_bias": [0.0]}, {}, T, "params.gate_bias: expected an array or None, got list; "),
        (
            {"up_bias": jnp.zeros((E, F + 1))},
            {},
            V,
            r"params.up_bias: expected shape \(4, 12\) .*, got \(4, 13\); make",
        ),
        ({"down_bias": jnp.zeros((E, F))}, {}, V, r"params.down_bias: expected shape \(4, 8\)"),
        (
            {"gate": None},
            {},
            V,
            r"params.gate_bias: expected None for .* without a gate, got shape",
        ),
        ({"up": None}, {}, T, "params.up: expected an array, got NoneType; "),
        (
            {"gate": None, "gate_bias": None},
            {"activation": SWIGLU},
            V,
            "params.gate: expected an array with a GatedActivation, which takes gate and up, got "
            "None; give the expert a gate",
        ),
        (
            {"shared": jax_ep.SharedExpert(None, jnp.ones((H, S)), jnp.ones((S, H)))},
            {"activation": SWIGLU},
            V,
            "params.shared.gate: expected an array with a GatedActivation",
        ),
        (
            {},
            {"activation": jax_ep.GatedActivation(Unhashable())},
            T,
            "activation: expected a function that can be hashed",
        ),
        ({"experts": {"w": jnp.ones(E)}}, {}, V, "params.experts: expected None without experts="),
        ({}, {"expert_specs": P("expert")}, V, "expert_specs: expected None without experts="),
    ],
)
def test_experts_of_jax_ep(weights, arguments, error, text):
    sizes = {"hidden": H, "intermediate": F, "num_experts": E}
    params = jax_ep.init_moe_params(jax.random.key(0), expert_bias=True, **sizes)
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        call(params._replace(**weights), **arguments)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: jax_ep.GatedActivation("silu"), T, "GatedActivation: .* function: .* got str; "),
        (lambda: jax_ep.clamped_swiglu("7"), T, "clamped_swiglu: .* limit: .* float, got str; "),
        (lambda: jax_ep.clamped_swiglu(0), V, "clamped_swiglu: .* limit: .* positive .*, got 0; "),
        (lambda: jax_ep.clamped_swiglu(alpha=jnp.ones(())), T, "alpha: expected a Python float"),
    ],
)
def test_activations(make, error, text):
    with pytest.raises(error, match=text):
        make()


def gives(change):
    """Options with a function that gives ``change`` of its rows."""
    return {"experts": lambda rows, *_: change(rows)}


@pytest.mark.parametrize(
    ("weights", "options", "error", "text"),
    [
        (
            {},
            gives(lambda rows: rows[:-1]),
            V,
            r"experts: .* rows of shape \(\d+, 8\), as .*padding",
        ),
        (
            {},
            gives(lambda rows: rows.astype(jnp.bfloat16)),
            T,
            r"experts: .* of dtype float32, that of x, got bfloat16; cast them with astype",
        ),
        ({}, gives(lambda rows: (rows, rows)), T, "experts: .* array of rows, got one .* tuple; "),
        ({}, {"experts": "relu"}, T, "experts: expected a function, got str; leave it out"),
        ({}, {"experts": Unhashable()}, T, "experts: .* that can be hashed, got .* Unhashable"),
        ({}, {"grouped_dot": lax.ragged_dot}, V, "grouped_dot: expected None with experts="),
        ({"up": UP}, {}, V, "params.up: expected None with experts=, .* got weights; put"),
        ({"down_bias": UP}, {}, V, "params.down_bias: expected None with experts="),
        (
            {"experts": None},
            {},
            V,
            r"params.experts: expected the weights .* got None; .* with \(\)",
        ),
        ({"experts": {"w": 1.0}}, {}, T, r"params.experts\['w'\]: expected an array, got float"),
        (
            {"experts": {"w": jnp.ones((3, E))}},
            {},
            V,
            r"params.experts\['w'\]: expected a first dimension of 4 experts, got shape \(3, 4\); "
            r"pass expert_specs",
        ),
        ({"experts": [jnp.ones(())]}, {}, V, r"params.experts\[0\]: expected a first dimension"),
        ({"experts": [jnp.ones((E, 0))]}, {}, V, r"params.experts\[0\]: .* array with elements"),
        (
            {},
            {"expert_specs": {"w": P("model")}},
            V,
            r"expert_specs\['w'\]: expected axes among \('data', 'expert'\), got .*'model'",
        ),
        (
            {"experts": {"w": jnp.ones((E, 3))}},
            {"expert_specs": P(None, "expert")},
            V,
            r"params.experts\['w'\]: .* splits evenly, into \(1, 2\) parts, got \(4, 3\); change",
        ),
        (
            {"experts": {"w": jnp.ones(E)}},
            {"expert_specs": P(None, "expert")},
            V,
            r"params.experts\['w'\]: .* splits evenly",
        ),
        (
            {},
            {"expert_specs": {"w": "expert"}},
            T,
            r"expert_specs\['w'\]: .* PartitionSpec, got str",
        ),
        ({"router_kernel": None}, {}, T, "params.router_kernel: expected an array, got NoneType"),
    ],
)
def test_experts_of_ones_own(weights, options, error, text):
    params = jax_ep.MoEParams(router_kernel=jnp.ones((H, E)), experts={"w": jnp.ones((E, 2))})
    options = {"experts": lambda rows, *_: rows} | options
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        call(params._replace(**weights), **options)
