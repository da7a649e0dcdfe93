"""The options of a run, with defaults. Imports no jax, so a command line can read it first."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

Balance = Literal["aux", "bias"]
Precision = Literal["f32", "bf16"]

DEFAULT_MINUTES = 5.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the model.

    Attributes:
        num_layers: Blocks of attention and experts.
        hidden: Channels; a multiple of twice ``num_heads``.
        num_heads: Attention heads.
        num_experts: Experts of each block; a multiple of the ranks that they are split over.
        top_k: Experts of each byte.
        expert_hidden: Inner channels of one expert.
        balance: The way to keep the experts evenly loaded: "aux" adds a loss to softmax routing,
            and "bias" is DeepSeek's bias on the scores of sigmoid routing, which has no gradient.
        capacity_factor: While training, an expert takes at most this many times its even share of
            bytes, and the rest is dropped. None drops nothing. Evaluation never drops.
        dtype: "f32" or "bf16", the dtype of the computation; parameters are float32.
    """

    num_layers: int = 4
    hidden: int = 128
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_hidden: int = 256
    balance: Balance = "aux"
    capacity_factor: float | None = 1.5
    dtype: Precision = "f32"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the model is trained.

    Attributes:
        seed: Seed of the parameters and of the order of the data.
        batch_size: Windows in a batch, over all devices; a multiple of their number.
        seq_len: Bytes in a window.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps in which the learning rate rises from zero to its peak.
        weight_decay: Weight decay of matrices, as in AdamW.
        max_grad_norm: Gradients of a larger global norm are scaled down to it.
        aux_weight: Weight of the load balancing loss.
    """

    seed: int = 0
    batch_size: int = 16
    seq_len: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    aux_weight: float = 0.01


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a run trains, and where it leaves its results.

    Attributes:
        out: Folder of everything that is written; processes share it.
        steps: Steps of the whole run, over all parts of a run that is resumed.
        minutes: Minutes of training of the whole run, without compiling, evaluating and saving. If
            both this and ``steps`` are None, a new run trains for ``DEFAULT_MINUTES``, and a
            resumed run keeps its first limit.
        checkpoint_every: Steps between checkpoints; None makes one about once a minute. There is one
            after the last step too.
        resume: Go on from the newest checkpoint in ``out``.
        prompt: Beginning of the text sample.

    Raises:
        ValueError: if both ``steps`` and ``minutes`` are given.
    """

    out: pathlib.Path = pathlib.Path("runs/train_moe")
    steps: int | None = None
    minutes: float | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    prompt: str = "def "

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"--steps: expected either this or --minutes, got {self.steps} steps and "
                f"{self.minutes:g} minutes; leave one out."
            )
