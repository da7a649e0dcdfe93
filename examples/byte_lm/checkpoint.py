"""Checkpoints of a run, by orbax. Every process calls these functions and writes its own part."""

from __future__ import annotations

import pathlib
from typing import Any

import orbax.checkpoint as ocp

from byte_lm.training import TrainState

_KEPT = 2


def newest(folder: pathlib.Path) -> int | None:
    """Steps done in the newest checkpoint in ``folder``; None where there is none.

    It only looks, so ``folder`` need not exist and is not made.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


class Checkpoints:
    """The checkpoints in one folder, by the number of steps done; the last two are kept."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Open ``folder``, which all processes share; it is made if it is not there."""
        # Orbax asks for an absolute path.
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT, enable_async_checkpointing=False
            ),
        )

    def latest(self) -> int | None:
        """Steps done in the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, settings: dict[str, Any]) -> None:
        """Write ``state`` after ``step`` steps, and the JSON-like ``settings`` of its run."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
            ),
        )

    def settings(self, step: int) -> dict[str, Any]:
        """The settings that were saved after ``step`` steps."""
        restore = ocp.args.Composite(settings=ocp.args.JsonRestore())
        return self._manager.restore(step, args=restore)["settings"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state after ``step`` steps, on the devices that ``abstract_state`` says."""
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=restore)["state"]

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()
