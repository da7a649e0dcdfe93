"""The checkpoint that a run begins from, and whether that is a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.common.checkpoints import Checkpoints, newest
from examples.common.folders import differences
from examples.pretrain.config import Config

# Sections and keys that change how a run computes, but not what: free in each part of a run.
_FREE_SECTIONS = ("parallel", "run")
_FREE_MODEL_KEYS = ("overlap", "remat")


def settings_of(config: Config, *, data_digest: str) -> dict[str, Any]:
    """What two parts of one run must have in common, to be kept in its checkpoints."""
    sections = dataclasses.asdict(config)
    kept = {name: value for name, value in sections.items() if isinstance(value, dict)}
    for name in _FREE_SECTIONS:
        del kept[name]
    kept["model"] = {
        key: value for key, value in kept["model"].items() if key not in _FREE_MODEL_KEYS
    }
    # The order of rows is the data of a run, and the only thing in the section that is.
    return kept | {"rows": data_digest, "order": {"seed": config.run.seed}}


def find_checkpoint(out: pathlib.Path, *, resume: bool) -> int | None:
    """The step to go on from; None to begin. All processes go by what process 0 sees.

    Raises:
        FileExistsError: if there is a checkpoint and ``resume`` is False.
    """
    found = newest(out / "checkpoints")
    if jax.process_count() > 1:
        # A file system shared by hosts may show them a new folder at different times.
        number = np.array(-1 if found is None else found, np.int32)
        agreed = int(multihost_utils.broadcast_one_to_all(number))
        found = None if agreed < 0 else agreed
    if found is not None and not resume:
        raise FileExistsError(
            f"--out: expected a folder without checkpoints, got {out}, which has one of step {found}; "
            "pass --resume to go on from it, or another folder."
        )
    return found


def position_in(
    checkpoints: Checkpoints, step: int, settings: dict[str, Any], *, allow_changes: bool
) -> tuple[int, list[str]]:
    """The position in the data at a checkpoint, and what has changed since then.

    Args:
        checkpoints: The checkpoints.
        step: The one to go on from.
        settings: As ``settings_of`` gives them now.
        allow_changes: Whether they may differ from those at the checkpoint.

    Raises:
        ValueError: if they differ and may not.
    """
    saved = checkpoints.settings(step)
    position = saved.pop("position", None)
    if position is None:
        raise ValueError(f"--resume: expected a checkpoint of this trainer, got others at {step}.")
    changes = differences(saved, settings)
    if changes and not allow_changes:
        raise ValueError(
            f"--resume: expected the settings of the run, got others: {', '.join(changes)}; "
            "--allow-changes accepts them."
        )
    return position, changes
