"""Errors that happen while a program runs, and the way they reach the user.

XLA turns every error of a running program into a ``JaxRuntimeError``, so the class of our errors is
lost. But their text begins with ``jax_ep.CommunicationError:``, so ``errors`` can restore the
class.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

_PREFIX = "jax_ep.CommunicationError:"


class CommunicationError(RuntimeError):
    """A rank of an expert-parallel group did not do its part of an op.

    The text names the rank that noticed, the op, the phase, what it waited for and what it saw.
    """

    @property
    def peer(self) -> int | None:
        """On GPUs: the rank that did not come in time, or whose process is gone.

        None where this rank has not seen that itself, but was told by another one that the op failed.
        """
        found = re.search(r"(?:waited \S+ s for|the process of) rank (\d+)", str(self))
        return None if found is None else int(found[1])


def from_runtime_error(error: BaseException) -> CommunicationError | None:
    """The ``CommunicationError`` that XLA's ``error`` carries as text, or None.

    XLA hands the text of a failing custom call to the user inside an error of its own
    (``jax.errors.JaxRuntimeError``), behind a status code and sometimes followed by a trace.
    """
    text = str(error)
    return from_text(text) if _PREFIX in text else None


def from_text(text: str) -> CommunicationError:
    """The error that native code reported as ``text``."""
    return CommunicationError(text.partition(_PREFIX)[2].strip())


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Raise ``CommunicationError`` itself where XLA would raise ``JaxRuntimeError``.

    JAX runs ahead of the device, so wait for the results inside the block::

        with jax_ep.errors():
            loss = jax.block_until_ready(train_step(state, batch))

    Raises:
        CommunicationError: if the block raised a runtime error that came from a jax_ep op. Any
            other exception passes through unchanged.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        communication_error = from_runtime_error(error)
        if communication_error is None:
            raise
        raise communication_error from error
