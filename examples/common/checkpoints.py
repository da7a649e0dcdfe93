"""Checkpoints of a run, by orbax. Every process calls these functions and writes its own part."""

from __future__ import annotations

import pathlib
from typing import Any, TypeVar

import orbax.checkpoint as ocp

State = TypeVar("State")


def newest(folder: pathlib.Path) -> int | None:
    """Steps done in the newest checkpoint in ``folder``; None where there is none.

    It only looks, so ``folder`` need not exist and is not made.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


class Checkpoints:
    """The checkpoints in one folder, by the number of steps done; the last few are kept."""

    def __init__(self, folder: pathlib.Path, *, kept: int = 2, in_background: bool = False) -> None:
        """Open ``folder``, which all processes share; it is made if it is not there.

        Args:
            folder: Where the checkpoints are.
            kept: How many stay; older ones are removed.
            in_background: Whether ``save`` returns once the state is copied to the host, so that
                training goes on while threads write it.
        """
        # Orbax asks for an absolute path.
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=kept, enable_async_checkpointing=in_background
            ),
        )

    def latest(self) -> int | None:
        """Steps done in the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, settings: dict[str, Any]) -> None:
        """Write ``state`` after ``step`` steps, and the JSON-like ``settings`` of its run.

        In the background, this first waits for the last checkpoint, and raises its error if it failed.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
            ),
        )

    def wait(self) -> None:
        """Wait until everything is written, and raise the error of what could not be."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def settings(self, step: int) -> dict[str, Any]:
        """The settings that were saved after ``step`` steps."""
        restore = ocp.args.Composite(settings=ocp.args.JsonRestore())
        return self._manager.restore(step, args=restore)["settings"]

    def restore(self, step: int, abstract_state: State) -> State:
        """The state after ``step`` steps, on the devices that ``abstract_state`` says."""
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=restore)["state"]

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()
