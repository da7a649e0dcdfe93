"""Groups that span hosts, as far as no GPU is needed: what processes agree on, and how they end."""

from __future__ import annotations

import logging
import types

import jax
import pytest

from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._errors import CommunicationError
from jax_ep._groups import meetings, network

PROCESSES = (0, 1, 2, 3)
MY_ANSWER = {"unavailable": "", "devices": 1, "version": [3, 4, 5]}


class FakeLibrary:
    """Stands for ``jax_ep._nvshmem``: remembers what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.started = False
        self.error: str | None = None

    def loaded_version(self):
        return (3, 4, 5)

    def runs(self):
        return self.started

    def unique_id(self):
        return b"\x01job", None

    def start(self, *arguments):
        self.calls.append(("start", *arguments))
        self.started = True
        return self.error

    def add_network(self, *arguments):
        self.calls.append(("add_network", *arguments))

    def network_bytes(self, *arguments):
        return 1000

    def end(self):
        self.calls.append(("end",))
        self.started = False


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setattr(network, "library", lambda: fake)
    monkeypatch.setattr(network, "_end_at_exit", lambda: None)
    monkeypatch.setattr(network, "_used_bytes", 0)
    monkeypatch.setattr(network, "_settings_of_groups", {})
    monkeypatch.setattr(libraries, "why_unavailable", lambda _: None)
    monkeypatch.setattr(jax, "process_count", lambda: len(PROCESSES))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: [None])
    network.obstacle.cache_clear()
    yield fake
    network.obstacle.cache_clear()


def answer(monkeypatch, **of_process_1):
    """All processes answer as this one does, but for some of what process 1 says."""

    def meet(processes, said, descriptors=()):
        others = {process: dict(said) for process in processes if process != jax.process_index()}
        others[1] |= {key: value for key, value in of_process_1.items() if key in said}
        if "id" in said:
            others[0]["id"] = b"\x01job".hex()
        return {process: (message, []) for process, message in others.items()}

    monkeypatch.setattr(meetings, "meet", meet)


@pytest.mark.parametrize(("hosts", "lanes"), [(2, 64), (8, 9), (64, 1)])
def test_settings_fit_the_number_of_hosts(hosts, lanes):
    settings = network.settings_for(hosts)
    assert settings == network.Settings(lanes, 256 << 10, 256 << 10)
    assert settings.max_choices == 128 << 10 and settings.max_row_bytes == (255 << 10)


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_EP_NETWORK_LANES", "3")
    monkeypatch.setenv("JAX_EP_NETWORK_CHUNK_BYTES", "65536")
    monkeypatch.setenv("JAX_EP_NETWORK_CHOICES", "1000")
    assert network.settings_for(2) == network.Settings(3, 65536, 2048)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("JAX_EP_NETWORK_CHUNK_BYTES", "100000", "a multiple of 1024 of at least 8192, got 100000"),
        ("JAX_EP_NETWORK_CHUNK_BYTES", "4096", "a multiple of 1024 of at least 8192, got 4096"),
        ("JAX_EP_NETWORK_LANES", "many", "expected a number, got 'many'"),
        ("JAX_EP_NETWORK_BYTES", "-1", "expected a number, got '-1'"),
    ],
)
def test_wrong_settings_are_an_obstacle(name, value, text, library, monkeypatch):
    answer(monkeypatch)
    monkeypatch.setenv(name, value)
    reason = network.obstacle(PROCESSES, 2)
    assert reason is not None and text in reason and "in process 0" in reason


@pytest.mark.parametrize(
    ("of_process_1", "text"),
    [
        ({}, None),
        ({"unavailable": "NVSHMEM did not load"}, "in process 1 NVSHMEM did not load"),
        ({"devices": 2}, "process 1 has 2 GPUs, and groups that span hosts need one process for"),
        ({"version": [3, 4, 6]}, "differ in NVSHMEM's version: process 3 has [3, 4, 5], process 1"),
        ({"settings": [1, 2, 3, 4]}, "differ in the settings of the network: process 3 has [64,"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_obstacles(of_process_1, text, library, monkeypatch):
    """What one process lacks or has otherwise is the same reason in all of them."""
    answer(monkeypatch, **of_process_1)
    reason = network.obstacle(PROCESSES, 2)
    assert reason is None if text is None else text in reason


def test_all_processes_of_the_job_take_part(library, monkeypatch):
    answer(monkeypatch)
    reason = network.obstacle((0, 1, 2), 3)
    assert reason is not None and "devices of 3 of 4 processes" in reason


def test_a_group_gets_its_part(library, monkeypatch):
    """The second group begins where the first one ends, and NVSHMEM is started for both alike."""
    answer(monkeypatch)
    hosts = [[0, 1], [2, 3]]
    for group_id in (7, 8):
        network.add(group_id, 5, hosts)
    start = ("start", 5, 2, 4, b"\x01job", 2 << 30)
    part = (5, 1, hosts, 64, 256 << 10, 256 << 10)
    assert library.calls == [
        start,
        ("add_network", 7, *part, 0),
        start,
        ("add_network", 8, *part, 1000),
    ]
    assert network.settings_of(8).num_lanes == 64


def test_an_error_of_a_process_is_raised_in_all(library, monkeypatch):
    answer(monkeypatch, error="no room")
    with pytest.raises(CommunicationError, match="the group was not made: process 1: no room"):
        network.add(7, 0, [[0, 1], [2, 3]])
    assert library.calls == []  # nobody waits in NVSHMEM for one who does not come


def test_own_error_is_told(library, monkeypatch):
    answer(monkeypatch)
    library.error = "NVSHMEM has no room"
    with pytest.raises(CommunicationError, match="NVSHMEM has no room"):
        network.add(7, 0, [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("of_process_1", "text"),
    [
        ({"used": 5}, "have made different groups before"),
        ({"what": "network 9"}, "process 1 makes another group than this one"),
    ],
    ids=["used", "what"],
)
def test_groups_are_made_in_one_order(of_process_1, text, library, monkeypatch):
    answer(monkeypatch, **of_process_1)
    with pytest.raises(CommunicationError, match=text):
        network.add(7, 0, [[0, 1], [2, 3]])


def never(*_):
    raise TimeoutError("not all came")


@pytest.mark.parametrize(
    ("failure", "wait", "ends"),
    [
        (None, lambda *_: None, True),
        ("a peer is gone", lambda *_: None, False),
        (None, never, False),
    ],
    ids=["orderly", "after-a-failure", "alone"],
)
def test_the_end_waits_for_nobody_who_is_gone(failure, wait, ends, library, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jax_ep")
    groups = types.SimpleNamespace(group_failure=lambda _: failure)
    monkeypatch.setattr(network.importlib, "import_module", lambda _: groups)
    monkeypatch.setattr(_compat, "wait_for_all", wait)
    monkeypatch.setattr(network, "_settings_of_groups", {7: None})
    library.started = True
    network._end()
    assert library.calls == ([("end",)] if ends else [])
