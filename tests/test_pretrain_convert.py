"""Weights with DeepSeek-V3's names become parameters of ``examples/pretrain``."""

from __future__ import annotations

import pretrain_texts  # noqa: F401  # isort: skip  (first: it puts the repository on the path)

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.pretrain import config, convert
from examples.pretrain.rotary import frequencies, rotate
from examples.pretrain.step import TrainState, setup
from spmd import ranks_at_most

pytestmark = pytest.mark.one_process("reads files of its own")

DEVICES = ranks_at_most(4)
SMALL = {
    "vocab_size": 48,
    "hidden": 32,
    "num_layers": 3,
    "num_dense_layers": 1,
    "num_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "dense_intermediate": 24,
    "moe_intermediate": 20,
    "num_experts": 4,
    "top_k": 2,
    "num_expert_groups": 2,
    "top_k_groups": 2,
}
THETA = 10_000.0
# Of the published DeepSeek-V3.
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def load_config(*changes: str) -> config.Config:
    small = [f"model.{name}={value}" for name, value in SMALL.items()]
    return config.load("tiny", [*small, "parallel.expert=2", "model.mtp=true", *changes])


def their_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of such a model as DeepSeek-V3's code has them: matrices are [out, in]."""
    shapes = {
        "model.embed_tokens.weight": (48, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (48, 32),
        "model.layers.3.enorm.weight": (32,),
        "model.layers.3.hnorm.weight": (32,),
        "model.layers.3.eh_proj.weight": (32, 64),
        "model.layers.3.shared_head.norm.weight": (32,),
        "model.layers.3.embed_tokens.weight": (48, 32),
        "model.layers.3.shared_head.head.weight": (48, 32),
    }
    attention = {
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        "self_attn.q_a_proj.weight": (8, 32),
        "self_attn.q_a_layernorm.weight": (8,),
        "self_attn.q_b_proj.weight": (2 * (12 + 8), 8),
        "self_attn.kv_a_proj_with_mqa.weight": (16 + 8, 32),
        "self_attn.kv_a_layernorm.weight": (16,),
        "self_attn.kv_b_proj.weight": (2 * (12 + 10), 16),
        "self_attn.o_proj.weight": (32, 2 * 10),
    }

    def swiglu(name: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"mlp.{name}gate_proj.weight": (inner, 32),
            f"mlp.{name}up_proj.weight": (inner, 32),
            f"mlp.{name}down_proj.weight": (32, inner),
        }

    moe = {"mlp.gate.weight": (4, 32), "mlp.gate.e_score_correction_bias": (4,)}
    for name in ("shared_experts.", *(f"experts.{expert}." for expert in range(4))):
        moe |= swiglu(name, 20)
    for layer in range(4):
        of_layer = attention | (swiglu("", 24) if layer == 0 else moe)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in their_shapes().items()
    }


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """Two files, as models come in several."""
    names = sorted(tensors)
    for index in range(2):
        part = {name: tensors[name] for name in names[index::2]}
        save_file(part, folder / f"model-{index}.safetensors", metadata={"format": "pt"})
    return folder


def empty_state(settings: config.Config) -> TrainState:
    made = setup(settings, jax.devices()[:DEVICES])
    return jax.tree.map(
        lambda like: (
            jax.device_put(np.full(like.shape, np.nan, like.dtype), like.sharding)
            if like.dtype == np.float32
            else None
        ),
        made.abstract_state(),
    )


def load(folder: pathlib.Path, *changes: str) -> TrainState:
    settings = load_config(*changes)
    return convert.load(folder, settings.model, empty_state(settings))


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> TrainState:
    return load(write(tmp_path_factory.mktemp("weights"), theirs))


def test_every_parameter_is_filled_where_it_was(ours):
    empty = empty_state(load_config())
    for got, before in zip(
        jax.tree.leaves((ours.params, ours.router_bias)),
        jax.tree.leaves((empty.params, empty.router_bias)),
        strict=True,
    ):
        assert got.sharding == before.sharding and got.shape == before.shape
        assert np.isfinite(got).all()


def test_values_are_where_they_belong(ours, theirs):
    params = jax.device_get(ours.params)
    layer = "model.layers.{}.{}".format
    for got, expected in (
        (params["embedding"], theirs["model.embed_tokens.weight"]),
        (params["head"]["kernel"], theirs["lm_head.weight"].T),
        (params["norm"]["scale"], theirs["model.norm.weight"]),
        (params["dense"]["mlp"]["down"]["kernel"][0], theirs[layer(0, "mlp.down_proj.weight")].T),
        (
            params["moe"]["norm_mlp"]["scale"][1],
            theirs[layer(2, "post_attention_layernorm.weight")],
        ),
        (
            params["moe"]["attention"]["out"]["kernel"][0],
            theirs[layer(1, "self_attn.o_proj.weight")].T,
        ),
        (params["moe"]["experts"]["router_kernel"][1], theirs[layer(2, "mlp.gate.weight")].T),
        (params["moe"]["experts"]["up"][1, 3], theirs[layer(2, "mlp.experts.3.up_proj.weight")].T),
        (
            params["moe"]["experts"]["down"][0, 2],
            theirs[layer(1, "mlp.experts.2.down_proj.weight")].T,
        ),
        (
            params["mtp"]["block"]["experts"]["gate"][1],
            theirs[layer(3, "mlp.experts.1.gate_proj.weight")].T,
        ),
        (params["mtp"]["norm"]["scale"], theirs[layer(3, "shared_head.norm.weight")]),
        (params["mtp"]["norm_hidden"]["scale"], theirs[layer(3, "hnorm.weight")]),
        (ours.router_bias[0], theirs[layer(1, "mlp.gate.e_score_correction_bias")]),
        (ours.router_bias[2], theirs[layer(3, "mlp.gate.e_score_correction_bias")]),
    ):
        np.testing.assert_array_equal(got, expected)


def test_the_module_for_the_token_after_next_joins_the_other_way_round(ours, theirs):
    random = np.random.default_rng(1)
    hidden, embedding = random.standard_normal((2, 32)).astype(np.float32)
    expected = theirs["model.layers.3.eh_proj.weight"] @ np.concatenate([embedding, hidden])
    kernel = np.asarray(ours.params["mtp"]["project"]["kernel"])
    np.testing.assert_allclose(np.concatenate([hidden, embedding]) @ kernel, expected, rtol=1e-5)


def test_rotary_scores_are_those_of_neighbouring_pairs(ours, theirs):
    """DeepSeek turns the pair (2 i, 2 i + 1), as one complex number; ours are half a head apart."""
    random = np.random.default_rng(2)
    latent, x = random.standard_normal(8), random.standard_normal(32)
    layer, at_query, at_key = 1, 7, 3
    name = f"model.layers.{layer}.self_attn."

    def turned(raw: np.ndarray, position: int) -> np.ndarray:
        wavelengths = THETA ** (-np.arange(4) / 4)
        return (raw[0::2] + 1j * raw[1::2]) * np.exp(1j * position * wavelengths)

    def rotated(channels: np.ndarray, position: int) -> np.ndarray:
        given = np.float32(channels)[None, None, None]
        turns = frequencies(load_config().model)
        return np.asarray(rotate(given, np.array([[position]]), turns))[0, 0, 0]

    attention = jax.device_get(ours.params["moe"]["attention"])
    queries = (latent @ attention["q_b"]["kernel"][layer - 1]).reshape(2, 20)
    raw_queries = (theirs[name + "q_b_proj.weight"] @ latent).reshape(2, 20)
    key = (x @ attention["kv_a"]["kernel"][layer - 1])[16:]
    raw_key = (theirs[name + "kv_a_proj_with_mqa.weight"] @ x)[16:]
    for query, raw_query in zip(queries, raw_queries, strict=True):
        np.testing.assert_allclose(query[:12], raw_query[:12], rtol=1e-5)
        expected = (turned(raw_query[12:], at_query) * turned(raw_key, at_key).conj()).sum().real
        got = rotated(query[12:], at_query) @ rotated(key, at_key)
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_float8_is_multiplied_with_its_scales(tmp_path, monkeypatch, theirs):
    monkeypatch.setattr(convert, "_SCALE_BLOCK", 16)
    name = "model.layers.0.mlp.gate_proj.weight"  # [24, 32]
    scale = np.array([[1.0, 2.0], [4.0, 8.0]], np.float32)
    value = np.round(theirs[name]).astype(ml_dtypes.float8_e4m3fn)
    tensors = theirs | {name: value, f"{name}_scale_inv": scale}
    tensors["lm_head.weight"] = theirs["lm_head.weight"].astype(ml_dtypes.bfloat16)
    params = jax.device_get(load(write(tmp_path, tensors)).params)
    blocks = np.kron(scale, np.ones((16, 16)))[:24]
    np.testing.assert_array_equal(
        params["dense"]["mlp"]["gate"]["kernel"][0], (value.astype(np.float32) * blocks).T
    )
    expected = tensors["lm_head.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["head"]["kernel"], expected)


def test_without_the_module_its_tensors_stay_out(tmp_path, theirs):
    state = load(write(tmp_path, theirs), "model.mtp=false")
    assert "mtp" not in state.params and state.router_bias.shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lm_head.weight": None}, "expected a tensor lm_head.weight in .*, got none"),
        (
            {"model.norm.weight": np.ones(31, np.float32)},
            r"expected \(32,\) for norm/scale, got \(31,",
        ),
        (
            {"model.layers.9.x": np.ones(1, np.float32)},
            "expected the tensors of this model, got 1 more, such as model.layers.9.x; do",
        ),
        (
            {"model.norm.weight": np.ones(32, np.int32)},
            "expected F32, F16, BF16, F8_E4M3, got I32 in",
        ),
    ],
    ids=["missing", "shape", "more", "dtype"],
)
def test_tensors_that_do_not_fit(tmp_path, theirs, change, text):
    tensors = {name: value for name, value in (theirs | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"--weights: {text}"):
        load(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"n_group": 8}, "expected model.num_expert_groups = 8, as .*config.json says, got 2"),
        ({"rope_scaling": YARN}, "expected model.rope_factor = 40, as .*json says of rope_scaling"),
        (
            {"rope_scaling": YARN | {"mscale": 0.7}},
            "expected rope_scaling of type yarn with mscale",
        ),
        ({"rope_scaling": {"type": "linear"}}, "expected rope_scaling of type yarn"),
    ],
    ids=["groups", "factor", "mscale", "type"],
)
def test_settings_that_do_not_fit(tmp_path, setting, text):
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 10_000} | setting))
    with pytest.raises(ValueError, match=f"--weights: {text}"):
        convert.load(tmp_path, load_config().model, None)


def test_settings_of_yarn(tmp_path):
    """They fit if all are the same; without them in config.json the model has none."""
    path, scaled = tmp_path / "config.json", load_config("model.rope_factor=40").model
    path.write_text(json.dumps({"rope_theta": 10_000, "rope_scaling": YARN}))
    with pytest.raises(FileNotFoundError):  # no weights: the settings have passed
        convert.load(tmp_path, scaled, None)
    path.write_text(json.dumps({"rope_theta": 10_000}))
    with pytest.raises(
        ValueError, match=r"model.rope_factor = 1, as .* has no rope_scaling, got 4"
    ):
        convert.load(tmp_path, scaled, None)


def test_a_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with safetensors files, got"):
        convert.load(tmp_path, load_config().model, None)
