"""Many steps in flight, programs with a free order of ops, ranks that never come.

Programs that could hang run in their own process, with a deadline: see ``stress_programs``.
"""

from __future__ import annotations

import pathlib
import re

import jax
import pytest

import machine
from spmd import run_python

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() != "cpu", reason="these programs drive the native CPU backend"
    ),
    pytest.mark.one_process("its programs have processes of their own"),
]
PROGRAMS = pathlib.Path(__file__).with_name("support") / "stress_programs.py"


def run(*arguments: str, timeout: float = 60) -> str:
    flags = machine.compiler_flags(devices=16)
    done = run_python("-W", "error", str(PROGRAMS), *arguments, timeout=timeout, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == "done"
    return "\n".join(lines[:-1])


@pytest.mark.parametrize("ranks", ["8", "16"])
@pytest.mark.parametrize("program", ["unawaited", "unawaited_chain"])
def test_thousands_of_steps_in_flight(program, ranks):
    run(program, ranks)


@pytest.mark.parametrize("ranks", ["2", "8"])
def test_independent_ops(ranks):
    run("independent", ranks, timeout=120)


def test_two_threads():
    run("threads")


def test_a_rank_that_never_arrives():
    texts = [line for line in run("never_arrives").splitlines() if line.startswith("TEXT")]
    assert len(texts) == 2
    for text in texts:
        found = re.search(r"jax_ep\.CommunicationError: (.*)", text)
        assert found, text
        # The text names the rank that reports, the op, the phase, the missing rank and those
        # present.
        assert re.search(r"\brank [013]\b.*\bplan\b.*\bphase arrival\b", found[1]), text
        assert "rank 2" in found[1] and "ranks 0, 1, 3" in found[1], text
        assert re.search(r"waited [2-7]\.\d s", found[1]) and "timeout=" in found[1], text


def test_errors_raises_the_class_itself():
    text = run("errors_context")
    assert re.search(r"^TEXT rank [12]: op plan: phase arrival: waited .* rank 0", text), text
