"""The ceilings that figures of ``python -m jax_ep.bench`` are compared with, without a GPU."""

from __future__ import annotations

import types

import pytest

from conftest import PLATFORM
from jax_ep._groups import gpu_side
from jax_ep.bench import ceilings
from jax_ep.bench.session import Session
from spmd import need_devices

pytestmark = pytest.mark.skipif(PLATFORM != "cpu", reason="sets up CPU devices of its own")


class Library:
    """Replaces the GPU library: each copy takes as long as it is told, or fails."""

    def __init__(self, seconds: float | None, place_error: str | None = None) -> None:
        self.seconds, self.place_error = seconds, place_error
        self.asked: list[tuple[int, ...]] = []

    def name_place(self, group_id, ordinal, pointer, num_bytes):
        return len(self.asked), pointer, self.place_error

    def time_copies(self, group_id, copies, num_bytes, mover, blocks, count):
        self.asked.append(tuple(rank for _, rank, *_ in copies))
        if self.seconds is None:
            return [], "no such luck"
        return [self.seconds * count] * len(copies), None


@pytest.fixture
def measured(monkeypatch):
    """Gives the ceilings of two ranks, for a library and whether the ranks have links."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    session.gpus, session.on_gpu = 2, True
    session.group = types.SimpleNamespace(id=0, backend="cuda")
    monkeypatch.setattr(ceilings, "NUM_BYTES", 4000)
    monkeypatch.setattr(ceilings, "_ppermute", lambda *_: 0.001)

    def measure(library, *, links, largest=None, hosts=1):
        session.has_links, session.gpus, session.hosts = links, 2 if links else 1, hosts
        if largest is not None:
            session.largest = largest
        monkeypatch.setattr(gpu_side, "library", lambda: library)
        return ceilings.measure(session)

    return measure


def test_links_are_read_from_the_next_rank(measured):
    library = Library(1e-6)
    found = measured(library, links=True)
    ways = ["bulk copies", "loads", "copy engines", "plain copies"]
    assert [way.name for way in found[:4]] == ways
    assert found[0].gbs == pytest.approx(4.0) and found[0].kind == "link"
    assert found[-1] == ("lax.ppermute", 0.001, "link")
    assert set(library.asked) == {(1, 0)}


def test_shared_memory_counts_bytes_read_and_written_by_all_ranks(measured):
    library = Library(1e-6)
    found = measured(library, links=False)
    assert found[0].gbs == pytest.approx(4.0 * 2 * 2) and found[0].kind == "memory"
    assert len(found) == 4 and set(library.asked) == {(0, 1)}


def test_ranks_are_counted_on_their_host(measured):
    """The library knows the ranks of one host only, and nothing but the network goes to others."""
    library = Library(1e-6)
    assert len(measured(library, links=False, hosts=2)) == 4 and set(library.asked) == {(0, 0)}
    assert [way.name for way in measured(Library(1e-6), links=True, hosts=2)] == ["lax.ppermute"]


def test_a_copy_that_fails_in_any_process_is_an_error_in_all(measured):
    with pytest.raises(RuntimeError, match="copies by bulk copies failed: no such luck"):
        measured(Library(None), links=True)
    with pytest.raises(RuntimeError, match="failed: in another process"):
        measured(Library(1e-6), links=True, largest=lambda value: max(value, float("inf")))


def test_memory_that_peers_cannot_read_leaves_xla_alone(measured):
    found = measured(Library(1e-6, "outside"), links=True)
    assert [way.name for way in found] == ["lax.ppermute"]
    assert measured(Library(1e-6, "outside"), links=False) == []
