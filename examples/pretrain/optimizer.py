"""AdamW with clipping and a schedule, by optax."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.pretrain.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Up to the peak in a straight line, and along a cosine down to the lowest rate.

    Step ``warmup_steps``, counted from one, has the peak, and step ``total_steps`` the lowest rate. The
    first step has a rate above zero, so it is not lost.
    """
    of_steps_done = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.total_steps,
        end_value=config.peak_lr * config.min_lr_ratio,
    )
    return lambda count: of_steps_done(count + 1)  # optax counts from zero


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of all parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: Any) -> Any:
    """Which parameters have weight decay: all but the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def state_shardings(
    optimizer: optax.GradientTransformation, state: Any, of_params: Any, mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: what belongs to a parameter lies as the parameter does."""
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        of_params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
