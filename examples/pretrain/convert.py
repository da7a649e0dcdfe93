"""Weights from safetensors files with DeepSeek-V3's names, for the option ``--weights`` of train.py.

The files are read one tensor at a time, and by a process only those that its devices hold a part of.
Matrices are transposed, since PyTorch keeps them as [out, in]; weights in float8 are multiplied with
their scales; and rotary channels change their order, because DeepSeek turns pairs of neighbours
(2 i, 2 i + 1), and ``rotary.rotate`` turns (i, i + half).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float32

from examples.pretrain.config import ModelConfig

if TYPE_CHECKING:
    from examples.pretrain.step import TrainState

# Ours on the left, DeepSeek's on the right. {layer} and {expert} are numbers.
_TOP = {
    "embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_LAYER = {
    "norm_attention/scale": "input_layernorm.weight",
    "norm_mlp/scale": "post_attention_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/q_a/kernel": "self_attn.q_a_proj.weight",
    "attention/q_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/q_b/kernel": "self_attn.q_b_proj.weight",
    "attention/kv_a/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/kv_b/kernel": "self_attn.kv_b_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "experts/router_kernel": "mlp.gate.weight",
    "experts/gate": "mlp.experts.{expert}.gate_proj.weight",
    "experts/up": "mlp.experts.{expert}.up_proj.weight",
    "experts/down": "mlp.experts.{expert}.down_proj.weight",
    "experts/shared_gate": "mlp.shared_experts.gate_proj.weight",
    "experts/shared_up": "mlp.shared_experts.up_proj.weight",
    "experts/shared_down": "mlp.shared_experts.down_proj.weight",
}
_BIAS = "mlp.gate.e_score_correction_bias"
_MTP = {
    "norm_hidden/scale": "hnorm.weight",
    "norm_embedding/scale": "enorm.weight",
    "project/kernel": "eh_proj.weight",
    "norm/scale": "shared_head.norm.weight",
}
# Of the multi-token prediction module, copies of the decoder's own.
_MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
_SCALE = "_scale_inv"
_SCALE_BLOCK = 128
_DTYPES: dict[str, Any] = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
# Values of DeepSeek's config.json that must be ours too.
_SETTINGS = {
    "rope_theta": "rope_theta",
    "num_experts_per_tok": "top_k",
    "n_group": "num_expert_groups",
    "topk_group": "top_k_groups",
    "routed_scaling_factor": "routed_scaling",
    "num_attention_heads": "num_heads",
}
_ROPE_SETTINGS = {
    "factor": "rope_factor",
    "original_max_position_embeddings": "rope_original_seq_len",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "mscale": "rope_mscale",
}


class Source(NamedTuple):
    """A tensor of the files, and where it goes in an array of the parameters.

    Attributes:
        name: Its name in the files.
        lead: Its place along the first dimensions of the array: the layer, or layer and expert.
    """

    name: str
    lead: tuple[int, ...]


def load(folder: pathlib.Path, model: ModelConfig, state: TrainState) -> TrainState:
    """``state`` with the weights of the safetensors files in ``folder``.

    Args:
        folder: With the files, and perhaps DeepSeek's ``config.json``.
        model: The model.
        state: A new state, whose shapes and shardings the result has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a tensor is missing, has another shape, or has no place in the model, or if
            config.json asks for another model.
    """
    _check_settings(folder, model)
    files = _Files(folder)

    def leaf(path: tuple[Any, ...], like: jax.Array) -> jax.Array:
        name = "/".join(entry.key for entry in path)
        return _read(files, sources(name, model), name, like, model)

    params = jax.tree_util.tree_map_with_path(leaf, state.params)
    layers = range(model.num_dense_layers, model.num_layers + model.mtp)
    biases = [Source(f"model.layers.{n}.{_BIAS}", (i,)) for i, n in enumerate(layers)]
    bias = _read(files, biases, "router_bias", state.router_bias, model)
    files.check_all_used(model)
    return dataclasses.replace(state, params=params, router_bias=bias)


def sources(name: str, model: ModelConfig) -> Iterator[Source]:
    """The tensors that make the parameter ``name``, a path with slashes.

    Raises:
        KeyError: if there is none of that name.
    """
    if name in _TOP:
        yield Source(_TOP[name], ())
        return
    part, _, rest = name.partition("/")
    if part == "mtp" and rest in _MTP:
        yield Source(f"model.layers.{model.num_layers}.{_MTP[rest]}", ())
        return
    layers = {
        "dense": range(model.num_dense_layers),
        "moe": range(model.num_dense_layers, model.num_layers),
        "mtp": range(model.num_layers, model.num_layers + 1),
    }[part]
    rest = rest.removeprefix("block/")
    experts = range(model.num_experts) if "{expert}" in _LAYER[rest] else (None,)
    for (index, layer), expert in itertools.product(enumerate(layers), experts):
        lead = [] if part == "mtp" else [index]
        lead += [] if expert is None else [expert]
        yield Source(f"model.layers.{layer}.{_LAYER[rest].format(expert=expert)}", tuple(lead))


def _read(
    files: _Files, parts: Iterable[Source], name: str, like: jax.Array, model: ModelConfig
) -> jax.Array:
    """An array of the shape and on the devices of ``like``, one tensor after the other."""
    places = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, like.shape, strict=True))
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
        if index is not None
    }
    # One for each part, however many devices have copies of it.
    buffers = {
        place: np.empty([stop - start for start, stop in place], np.float32)
        for place in places.values()
    }
    for source in parts:
        depth = len(source.lead)
        wanted = {
            place: buffer
            for place, buffer in buffers.items()
            if all(a <= at < b for at, (a, b) in zip(source.lead, place[:depth], strict=True))
        }
        if not wanted:
            files.skip(source.name)
            continue
        value = _arranged(files.read(source.name), name, model)
        if value.shape != like.shape[depth:]:
            raise ValueError(
                f"--weights: expected {like.shape[depth:]} for {name}, got {value.shape} in "
                f"{source.name}."
            )
        for place, buffer in wanted.items():
            at = tuple(
                at - start for at, (start, _) in zip(source.lead, place[:depth], strict=True)
            )
            buffer[at] = value[tuple(slice(*part) for part in place[depth:])]
    arrays = [jax.device_put(buffers[place], device) for device, place in places.items()]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


def _arranged(
    value: Float32[np.ndarray, "..."], name: str, model: ModelConfig
) -> Float32[np.ndarray, "..."]:
    """A tensor as the parameter ``name`` has it."""
    if name == "embedding" or value.ndim == 1:
        return value
    value = value.T  # [in, out]
    rope = model.qk_rope_head_dim
    pairs = np.concatenate([np.arange(0, rope, 2), np.arange(1, rope, 2)])
    if name.endswith(("attention/q/kernel", "attention/q_b/kernel")):
        heads = value.reshape(value.shape[0], model.num_heads, -1)
        nope = model.qk_nope_head_dim
        return np.concatenate([heads[..., :nope], heads[..., nope:][..., pairs]], axis=-1).reshape(
            value.shape
        )
    if name.endswith("attention/kv_a/kernel"):
        latent = model.kv_lora_rank
        return np.concatenate([value[:, :latent], value[:, latent:][:, pairs]], axis=1)
    if name == "mtp/project/kernel":  # DeepSeek joins embedding and hidden state, in this order
        embedding, hidden = np.split(value, 2)
        return np.concatenate([hidden, embedding])
    return value


class _Files:
    """The safetensors files of a folder, by the names of their tensors.

    A file is the length of its header, eight bytes, the header, which is JSON, and the tensors. They
    are mapped here, because the library safetensors gives NumPy no float8, as DeepSeek's weights are.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"--weights: expected a folder with safetensors files, got {folder}, which has none."
            )
        self._folder = folder
        self._tensors: dict[str, np.ndarray] = {}
        self._used: set[str] = set()
        for path in paths:
            content = np.memmap(path, np.uint8, mode="r")
            start = 8 + int.from_bytes(content[:8].tobytes(), "little")
            for name, tensor in json.loads(content[8:start].tobytes()).items():
                if name != "__metadata__":
                    first, last = (start + offset for offset in tensor["data_offsets"])
                    dtype = _dtype(tensor["dtype"], path)
                    self._tensors[name] = content[first:last].view(dtype).reshape(tensor["shape"])

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor in float32, multiplied with its scales if it has any."""
        self.skip(name)
        value = self._tensors[name].astype(np.float32)
        if (scale := self._tensors.get(name + _SCALE)) is not None:
            for axis in (0, 1):
                scale = scale.repeat(_SCALE_BLOCK, axis).take(range(value.shape[axis]), axis)
            value *= scale
        return value

    def skip(self, name: str) -> None:
        """Note that a tensor has a place, though not on the devices of this process."""
        if name not in self._tensors:
            raise ValueError(f"--weights: expected a tensor {name} in {self._folder}, got none.")
        self._used |= {name, name + _SCALE}

    def check_all_used(self, model: ModelConfig) -> None:
        """Raise if there are tensors that the model has no place for."""
        mtp = f"model.layers.{model.num_layers}."
        ignored = tuple(mtp + name for name in _MTP_COPIES) if model.mtp else (mtp,)
        left = [n for n in self._tensors if n not in self._used and not n.startswith(ignored)]
        if left:
            raise ValueError(
                f"--weights: expected the tensors of this model, got {len(left)} more, such as "
                f"{sorted(left)[0]}; does the configuration fit?"
            )


def _dtype(name: str, path: pathlib.Path) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(f"--weights: expected {', '.join(_DTYPES)}, got {name} in {path}.")
    return np.dtype(_DTYPES[name])


def _check_settings(folder: pathlib.Path, model: ModelConfig) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    theirs = json.loads(path.read_text())
    for name, ours in _SETTINGS.items():
        if name in theirs and theirs[name] != getattr(model, ours):
            raise ValueError(
                f"--weights: expected model.{ours} = {theirs[name]}, as {path} says, got "
                f"{getattr(model, ours)}."
            )
    _check_rope(path, theirs.get("rope_scaling"), model)


def _check_rope(path: pathlib.Path, theirs: dict[str, Any] | None, model: ModelConfig) -> None:
    """Rotary positions that are scaled must be so here too, and by YaRN as DeepSeek-V3 has it."""
    if not theirs:
        if model.rope_factor != 1:
            raise ValueError(
                f"--weights: expected model.rope_factor = 1, as {path} has no rope_scaling, got "
                f"{model.rope_factor}."
            )
        return
    # Where both are equal, rotary channels keep their size.
    mscale = theirs.get("mscale", 1)
    if theirs.get("type") != "yarn" or mscale != theirs.get("mscale_all_dim", 0):
        raise ValueError(
            "--weights: expected rope_scaling of type yarn with mscale equal to mscale_all_dim, got "
            f"{theirs} in {path}."
        )
    for name, ours in _ROPE_SETTINGS.items():
        if name in theirs and theirs[name] != getattr(model, ours):
            raise ValueError(
                f"--weights: expected model.{ours} = {theirs[name]}, as {path} says of "
                f"rope_scaling, got {getattr(model, ours)}."
            )
