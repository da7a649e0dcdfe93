"""Kernels between hosts without one of their waits, or with signals out of order: all are noticed.

``tests/cuda/network_mutants.sh FOLDER`` builds the libraries, and ``JAX_EP_NETWORK_MUTANTS`` names the
folder. Processes of two logical hosts of two ranks run steps that check themselves with each of them.
"""

from __future__ import annotations

import os
import pathlib

import pytest

import host_programs
from conftest import PLATFORM
from host_runs import run

FOLDER = pathlib.Path(os.environ.get("JAX_EP_NETWORK_MUTANTS", "/nonexistent")).resolve()

# The numbers of test_hooks.cuh, and whether the network between the hosts is the late one. There a
# chunk takes longer than anything on a host, so what a host does not wait for shows without it.
MUTANTS = {
    "8": True,  # a slot is used before its credit has come
    "9": True,  # a chunk is read before it has arrived
    "10": False,  # a slot is given back before all have read it
    "11": True,  # no order between a chunk and its signal
    "12": True,  # parts are added before they are there
    "13": True,  # parts are written again before they have been read
    "14": True,  # what comes home is added before it is there
    "15": False,  # a team tells others before all of its warps are done
    "20": True,  # the signal before the chunk
}
# So that slots are used again and again.
SMALL = {"JAX_EP_NETWORK_CHUNK_BYTES": "8192", "JAX_EP_NETWORK_LANES": "1"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.one_process("its programs have processes of their own"),
    pytest.mark.skipif(PLATFORM != "cuda", reason="needs a GPU"),
    pytest.mark.skipif(
        not FOLDER.exists(),
        reason="needs tests/cuda/network_mutants.sh FOLDER, and JAX_EP_NETWORK_MUTANTS=FOLDER",
    ),
]


def run_steps(name: str, tmp_path: pathlib.Path, *, late: bool):
    library = FOLDER / name / "_nvshmem.abi3.so"
    assert library.exists()
    found = run("steps", 2, 2, tmp_path, late=late, JAX_EP_TEST_LIBRARY=str(library), **SMALL)
    assert all("began at" in process.text for process in found), [p.text for p in found]
    return found


@pytest.mark.parametrize("late", [True, False], ids=["late", "reached"])
def test_all_is_right_without_a_mutation(late, tmp_path):
    """So what the others do wrong is due to the mutation, and not to the delays."""
    for process in run_steps("plain", tmp_path, late=late):
        assert process.status == 0 and "all right at" in process.text, process.text


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutation_is_noticed(name, tmp_path):
    """By wrong rows or sums, or by an error, in some process."""
    found = run_steps(name, tmp_path, late=MUTANTS[name])
    noticed = [process for process in found if process.status != 0]
    assert noticed, "no process noticed it"
    for process in noticed:
        assert process.status == host_programs.NOTICED or process.status < 0, process.text
