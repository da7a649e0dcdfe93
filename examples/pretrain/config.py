"""The configuration of a run: frozen dataclasses, read from TOML. Imports no jax.

``load("tiny")`` reads ``configs/tiny.toml``; a path to any other file works too. A file has a table for
each section (``[model]``, ``[parallel]``, ...). A key that it leaves out has the default below, and a
key that does not exist is an error. ``load("tiny", ["model.top_k=4"])`` changes single values.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import tomllib
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args

CONFIGS = pathlib.Path(__file__).parent / "configs"

Dtype = Literal["bfloat16", "float32"]
Attention = Literal["blockwise", "cudnn"]
Overlap = Literal["", "shared_expert", "chunks"]
Remat = Literal["none", "attention", "handle", "full"]


class ConfigError(ValueError):
    """A configuration that cannot be read or cannot work; the text names the key and the fix."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder, after DeepSeek-V3 (arXiv:2412.19437).

    Attributes:
        vocab_size: Ids of the tokenizer, rounded up as you like.
        hidden: H, channels of a token between layers.
        num_layers: Layers, dense ones included, the multi-token prediction module not.
        num_dense_layers: The first layers have a dense SwiGLU in place of experts.
        num_heads: Heads of the attention.
        q_lora_rank: Channels that queries are compressed to; 0 makes them from the token directly.
        kv_lora_rank: Channels that keys and values are compressed to.
        qk_nope_head_dim: Channels of a head's queries and keys without a position.
        qk_rope_head_dim: Those with a rotary position, which all heads of a key share; even.
        v_head_dim: Channels of a head's values.
        dense_intermediate: Inner channels of a dense SwiGLU.
        moe_intermediate: Inner channels of one expert.
        num_experts: Experts of a layer.
        top_k: Experts of a token.
        num_expert_groups: Groups of consecutive experts that limit a token's choice; 1 for no limit.
        top_k_groups: Groups that a token's experts may be in.
        num_shared_experts: Experts that every token goes to; they run as one of their joint width.
        routed_scaling: Factor of the routed experts' weights, which sum to one before.
        rope_theta: Base of the rotary positions' wavelengths.
        rope_factor: With YaRN (rotary.py), the longest sequence over the original one; 1 is without it.
        rope_original_seq_len: YaRN: the longest sequence of the training before it.
        rope_beta_fast: YaRN: channels that turn more often in such a sequence keep their frequency.
        rope_beta_slow: YaRN: channels that turn less often have it divided by the factor.
        rope_mscale: YaRN: how much the scores of attention grow with the factor; 0 leaves them.
        max_seq_len: The longest sequence that the model is meant for.
        mtp: Whether there is a module that predicts the token after the next one.
        mtp_loss_weight: Weight of its loss.
        attention: "blockwise", in plain JAX on any device, or "cudnn", which is several times as fast
            on GPUs (fused.py).
        most_segments: With "cudnn", documents of a row at most; pack.py keeps rows to it.
        dtype: Dtype of the computation. Master weights and the optimizer are float32.
        fp8_dispatch: Rows travel to the experts in float8.
        rank_capacity_factor: Rows that a rank has room for, as a multiple of those of even routing;
            further ones are dropped and counted. 0 has room for any routing.
        overlap: What runs while rows travel: "", "shared_expert" or "chunks" (see ``jax_ep.moe``).
        remat: What the backward pass computes again. "full": all of a layer but its input. "handle":
            the same but for the plans of dispatch, which are small. "attention": also but for the
            results of attention. "none": only the gathered weights.
        scan_layers: Compile equal layers once, in a loop. False unrolls them.
        sequence_loss_weight: Weight of the balancing loss within each sequence, summed over layers.
        z_loss_weight: Weight of the routers' z-loss, summed over layers.
        bias_update_rate: Step of the router biases, towards even load.
    """

    vocab_size: int
    hidden: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    dense_intermediate: int
    moe_intermediate: int
    num_experts: int
    top_k: int
    num_expert_groups: int = 1
    top_k_groups: int = 1
    num_shared_experts: int = 1
    routed_scaling: float = 1.0
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    rope_original_seq_len: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 1.0
    max_seq_len: int = 4096
    mtp: bool = False
    mtp_loss_weight: float = 0.3
    attention: Attention = "blockwise"
    most_segments: int = 16
    dtype: Dtype = "bfloat16"
    fp8_dispatch: bool = False
    rank_capacity_factor: float = 0.0
    overlap: Overlap = ""
    remat: Remat = "handle"
    scan_layers: bool = True
    sequence_loss_weight: float = 1e-4
    z_loss_weight: float = 0.0
    bias_update_rate: float = 1e-3

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, without the multi-token prediction module."""
        return self.num_layers - self.num_dense_layers


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh's axes. One of them may be −1: the rest of the devices.

    Attributes:
        data: Replicas of the whole state.
        fsdp: Parts that all weights are split into, besides those of ``expert``.
        expert: Ranks of a group, which split the experts. All other weights are split over them too.
        tensor: Parts of heads, vocabulary and inner channels.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine down to ``min_lr_ratio`` of the peak.

    Attributes:
        peak_lr: The highest learning rate.
        warmup_steps: Steps until it is reached.
        total_steps: Steps until the lowest one is reached.
        min_lr_ratio: The lowest learning rate over the highest.
        b1: Decay of the mean of gradients.
        b2: Decay of the mean of their squares.
        weight_decay: Weight decay of matrices; scales of norms have none.
        clip_norm: Gradients of a larger global norm are scaled down to it.
    """

    peak_lr: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 10_000
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sizes of a batch.

    Attributes:
        batch_size: Sequences of a step, over all devices and micro-batches.
        seq_len: Tokens of a sequence that are predicted.
        accumulate: Micro-batches that a step runs one after the other, adding their gradients.
    """

    batch_size: int = 16
    seq_len: int = 4096
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run does besides training.

    Attributes:
        seed: Seed of the initial weights and of the order of the data.
        save_every: Steps between checkpoints.
        eval_every: Steps between evaluations.
        eval_batches: Batches of an evaluation.
        log_every: Steps between lines of metrics.
        keep_checkpoints: Newest checkpoints that are kept.
        profile_every: Steps between profiles of one step, for the shares of its time that plans,
            dispatches and combines take; 0 for none.
    """

    seed: int = 0
    save_every: int = 500
    eval_every: int = 500
    eval_batches: int = 8
    log_every: int = 10
    keep_checkpoints: int = 3
    profile_every: int = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections.

    Attributes:
        name: Of the file that it was read from.
        model: The decoder.
        parallel: The mesh.
        optimizer: The optimizer and its schedule.
        data: Sizes of a batch.
        run: What a run does besides training.
    """

    name: str
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "run": RunConfig,
}


def load(name_or_path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name_or_path: Name of a file in ``configs/`` without its ending, or a path.
        overrides: Values to change, each as ``section.key=value``, the value as in TOML. Quotes
            around a string may be left out.

    Raises:
        ConfigError: if the file is not there, is no TOML, or has a key or value that cannot work.
    """
    path = pathlib.Path(name_or_path)
    if path.suffix != ".toml":
        path = CONFIGS / f"{name_or_path}.toml"
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        raise ConfigError(f"config {name_or_path}: expected one of {names}, or a path.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    _check_names(str(path), tables, SECTIONS)
    for override in overrides:
        _override(tables, override)
    sections = {name: _section(name, tables.get(name, {})) for name in SECTIONS}
    config = Config(path.stem, **sections)
    check(config)
    return config


def _override(tables: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot):
        raise ConfigError(f"override {text!r}: expected section.key=value, as in model.top_k=4.")
    _check_names(f"override {text!r}", [section], SECTIONS)
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    tables.setdefault(section, {})[field] = parsed


def _check_names(where: str, found: Any, known: Any) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; do you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}: {name!r} is none of {', '.join(known)}{hint}")


def _section(name: str, table: dict[str, Any]) -> Any:
    kind = SECTIONS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    _check_names(f"[{name}]", table, fields)
    missing = [
        field.name
        for field in fields.values()
        if field.default is dataclasses.MISSING and field.name not in table
    ]
    if missing:
        raise ConfigError(f"[{name}]: no value for {', '.join(missing)}.")
    return kind(**{key: _value(f"{name}.{key}", value, hints[key]) for key, value in table.items()})


def _value(key: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    choices = get_args(kind)
    if value in choices if choices else type(value) is kind:
        return value
    expected = (
        f"one of {', '.join(map(repr, choices))}" if choices else f"a value of {kind.__name__}"
    )
    raise ConfigError(f"{key}: expected {expected}, got {value!r}.")


def check(config: Config) -> None:
    """Check what does not depend on the number of devices.

    Raises:
        ConfigError: if values do not fit together.
    """
    model, data, parallel = config.model, config.data, config.parallel
    for section in ("model", "data"):
        for field in dataclasses.fields(SECTIONS[section]):
            value = getattr(getattr(config, section), field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if type(value) is int:
                _expect(value >= least, f"{section}.{field.name}", f"{least} or more", value)
    sizes = [getattr(parallel, field.name) for field in dataclasses.fields(parallel)]
    ok = all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1
    _expect(ok, "parallel", "sizes of 1 or more, and at most one −1", parallel)
    key, value = "model.num_dense_layers", model.num_dense_layers
    _expect(value < model.num_layers, key, f"fewer than the {model.num_layers} layers", value)
    groups, in_group = model.num_expert_groups, model.num_experts // model.num_expert_groups
    ok = model.num_experts % groups == 0
    _expect(ok, "model.num_expert_groups", f"a divisor of {model.num_experts} experts", groups)
    ok = model.top_k_groups <= groups
    _expect(ok, "model.top_k_groups", f"at most the {groups} groups", model.top_k_groups)
    most = model.top_k_groups * in_group
    _expect(model.top_k <= most, "model.top_k", f"at most the {most} experts allowed", model.top_k)
    key, value = "model.qk_rope_head_dim", model.qk_rope_head_dim
    _expect(value % 2 == 0, key, "an even number", value)
    _expect(model.rope_factor >= 1, "model.rope_factor", "1 or more", model.rope_factor)
    fast, slow = model.rope_beta_fast, model.rope_beta_slow
    _expect(0 < slow < fast, "model.rope_beta_slow", f"more than 0, less than {fast}", slow)
    ok = not (model.overlap == "shared_expert" and model.num_shared_experts == 0)
    _expect(ok, "model.overlap", "'' or 'chunks' without a shared expert", model.overlap)
    ok = not model.fp8_dispatch or model.hidden % 128 == 0
    _expect(ok, "model.hidden", "a multiple of 128 with fp8_dispatch", model.hidden)
    factor = model.rank_capacity_factor
    _expect(factor == 0 or factor >= 1, "model.rank_capacity_factor", "0, or 1 or more", factor)
    ok = data.seq_len <= model.max_seq_len
    _expect(ok, "data.seq_len", f"at most model.max_seq_len, {model.max_seq_len}", data.seq_len)
    ok = data.seq_len <= 1024 or data.seq_len % 128 == 0
    _expect(ok, "data.seq_len", "at most 1024, or a multiple of 128", data.seq_len)
    ok = data.batch_size % data.accumulate == 0
    _expect(ok, "data.batch_size", f"a multiple of accumulate, {data.accumulate}", data.batch_size)
    optimizer = config.optimizer
    ok = 0 <= optimizer.warmup_steps < optimizer.total_steps
    _expect(ok, "optimizer.warmup_steps", "fewer than total_steps", optimizer.warmup_steps)


_MAY_BE_ZERO = {"num_dense_layers", "q_lora_rank", "num_shared_experts"}


def _expect(ok: bool, key: str, expected: str, got: Any) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}.")
