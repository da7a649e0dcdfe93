"""Groups: identity, memory, ids, backends, and what ``create_group`` refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from conftest import BACKENDS
from jax_ep._backends import calls, native
from jax_ep._groups import create, gpu_side
from jax_ep._groups.room import MOST_CHANNELS, Room
from jax_ep._groups.topology import Topology
from spmd import fit, make_group, make_mesh, need_devices, ranks_at_most, run_python, shard

pytestmark = pytest.mark.one_process("asks for backends that serve one process")

RANKS = ranks_at_most(4)
DATA_EXPERT = ("data", "expert")


def test_equal_arguments_give_the_same_group(backend):
    group = make_group(RANKS, backend)
    again = Mesh(np.array(jax.devices()[:RANKS]), ("expert",))
    assert jax_ep.create_group(again, backend=backend) is group
    assert jax_ep.create_group(again, ("expert",), backend=backend) is group
    assert jax_ep.create_group(again, ["expert"], backend=backend) is group


def test_attributes(backend):
    sizes = fit((2, 4), DATA_EXPERT)
    mesh = make_mesh(sizes, DATA_EXPERT)
    group = jax_ep.create_group(mesh, "expert", backend=backend, timeout=5)
    assert group.mesh == mesh and group.axis_names == ("expert",) and group.size == sizes[1]
    assert group.backend == backend and group.timeout == 5
    assert isinstance(group.id, int) and 0 <= group.id < 2**63
    group.check()  # nothing has failed
    both = jax_ep.create_group(mesh, ("data", "expert"), backend=backend)
    assert both.axis_names == ("data", "expert") and both.size == mesh.size
    assert "data" in repr(both) and backend in repr(both)


def test_copies_are_the_group_itself(backend):
    group = make_group(2, backend)
    assert copy.copy(group) is group and copy.deepcopy(group) is group
    assert copy.deepcopy({"a": [group]})["a"][0] is group


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickling_is_refused(protocol):
    with pytest.raises(TypeError, match=r"Group: cannot be pickled.*create_group in each process"):
        pickle.dumps({"group": make_group(2, "reference")}, protocol)


def test_hashable_and_frozen(backend):
    group = make_group(2, backend)
    assert {group: 1}[make_group(2, backend)] == 1
    with pytest.raises(AttributeError):
        group.timeout = 3.0  # type: ignore[misc]


def test_a_static_argument_of_jit(backend):
    traced = []

    def run(group, x):
        traced.append(group)
        return x * group.size

    jitted = jax.jit(run, static_argnums=0)
    few, many = RANKS // 2, RANKS
    assert jitted(make_group(few, backend), 3) == jitted(make_group(few, backend), 3) == 3 * few
    assert jitted(make_group(many, backend), 3) == 3 * many and len(traced) == 2


def test_ids_differ(backend):
    mesh = make_mesh(fit((2, 2), DATA_EXPERT), DATA_EXPERT)
    groups = [
        jax_ep.create_group(mesh, "expert", backend=backend),
        jax_ep.create_group(mesh, "data", backend=backend),
        jax_ep.create_group(mesh, ("data", "expert"), backend=backend),
        jax_ep.create_group(mesh, ("expert", "data"), backend=backend),
        jax_ep.create_group(mesh, "expert", backend=backend, timeout=5),
        *(make_group(ranks, backend) for ranks in sorted({1, 2, RANKS})),
        jax_ep.create_group(Mesh(np.array(jax.devices()[:2][::-1]), ("expert",)), backend=backend),
    ]
    assert len({group.id for group in groups}) == len(groups)


PRINT_ID = """
import jax, jax_ep, numpy as np
junk = [object() for _ in range({junk})]
devices = np.array(jax.devices()[:{sizes[0]} * {sizes[1]}]).reshape({sizes})
mesh = jax.sharding.Mesh(devices, ("data", "expert"))
if {junk}:
    jax_ep.create_group(mesh, "data")
for backend in {backends}:
    print("id", backend, jax_ep.create_group(mesh, "expert", backend=backend).id)
"""


@functools.cache
def printed_ids(junk: int, seed: str) -> dict[str, str]:
    """The group's id with each backend, in a process that has made other groups or none."""
    code = PRINT_ID.format(junk=junk, backends=BACKENDS, sizes=fit((2, 2), DATA_EXPERT))
    done = run_python("-c", code, timeout=120, PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^id (\S+) (\S+)$", done.stdout, re.MULTILINE))


def test_ids_are_the_same_in_every_process(backend):
    """Ids do not depend on what a process did before, so cached programs stay valid."""
    mesh = make_mesh(fit((2, 2), DATA_EXPERT), DATA_EXPERT)
    ids = {printed_ids(junk, seed)[backend] for junk, seed in ((0, "1"), (1000, "2"))}
    assert ids == {str(jax_ep.create_group(mesh, "expert", backend=backend).id)}


def test_auto_follows_the_devices(native_backend, caplog):
    with caplog.at_level(logging.WARNING, "jax_ep"):
        group = jax_ep.create_group(make_mesh(ranks_at_most(3)), "expert")
    assert group.backend == native_backend
    assert not caplog.records, "a fallback was logged, though the native backend is there"


WITHOUT_LIBRARY = """
import sys
sys.modules["jax_ep._cpu"] = None  # an import of it fails
import jax, jax_ep, logging, numpy as np
logging.basicConfig(format="LOG %(message)s")
for count in (1, 2):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("expert",))
    assert jax_ep.create_group(mesh).backend == "reference"
try:
    jax_ep.create_group(mesh, backend="cpu")
except ValueError as error:
    print("ERROR", error)
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU library serves CPU meshes")
def test_fallback_to_the_reference_is_said_once():
    done = run_python("-c", WITHOUT_LIBRARY, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("LOG") == 1
    assert re.search(r"LOG .*reference backend.*_cpu", done.stderr)
    assert re.search(r"ERROR .*argument backend: .*'cpu'.*_cpu.*backend='reference'", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"mesh": "cpu"}, TypeError, r"mesh: expected .*Mesh or AbstractMesh, got str; .*make_mesh"),
        ({"axis_name": "model"}, ValueError, r"axis_name: .*\('data', 'expert'\), got \('model',\)"),
        ({"axis_name": ("expert", "model")}, ValueError, r"axis_name: .*got \('expert', 'model'\)"),
        ({"axis_name": ()}, ValueError, r"axis_name: .*got \(\)"),
        ({"axis_name": ("data", "data")}, ValueError, r"axis_name: .*once, got \('data', 'data'\)"),
        ({"axis_name": 3}, TypeError, "axis_name: expected .*, got int"),
        ({"axis_name": (0,)}, ValueError, r"axis_name: .*got \(0,\)"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of .*'auto'.*, got 'gpu'"),
        ({"timeout": 0}, ValueError, "timeout: expected at least 0.001 seconds, got 0; .*600"),
        ({"timeout": 1e-6}, ValueError, "timeout: expected at least 0.001 seconds, got 1e-06"),
        ({"timeout": -1.0}, ValueError, "timeout: expected at least 0.001 seconds, got -1.0"),
        ({"timeout": float("nan")}, ValueError, "timeout: expected at least 0.001 .*, got nan"),
        ({"timeout": "1"}, TypeError, "timeout: expected .*, got"),
    ],
)  # fmt: skip
def test_refused(arguments, error, text):
    mesh = make_mesh(fit((2, 2), DATA_EXPERT), DATA_EXPERT)
    with pytest.raises(error, match="jax_ep.create_group: argument " + text):
        jax_ep.create_group(**{"mesh": mesh, "backend": "reference"} | arguments)


@pytest.mark.parametrize("timeout", [1e-3, 2, float("inf")])
def test_shortest_and_endless_timeouts(backend, timeout):
    """They work as any other; no op tests whether all ranks come within a millisecond."""
    group = jax_ep.create_group(make_mesh(2), backend=backend, timeout=timeout)
    assert group.timeout == timeout
    run = lambda x, idx: jax_ep.dispatch(x, idx, group=group, num_experts=2).tokens  # noqa: E731
    jitted = jax.jit(shard(run, group.mesh))
    x, idx = jnp.ones((4, 16)), jnp.zeros((4, 1), jnp.int32)
    jitted.lower(x, idx)
    if timeout > 1:
        assert jitted(x, idx).sum() == 4 * 16


def test_native_code_is_told_a_finite_timeout(monkeypatch):
    """An infinite number of nanoseconds would become 0 there."""
    told = []
    library = types.SimpleNamespace(create_group=lambda *args: told.append(args[2]))
    monkeypatch.setattr(gpu_side, "library", lambda: library)
    rank = gpu_side.Rank(process=jax.process_index(), device=0, ordinal=0)
    for timeout in (5.0, float("inf")):
        gpu_side.create(1, [[rank]], Topology(((0,),), ((rank.process,),)), timeout, Room(1))
    assert told == [5.0, 1e9]


def test_workspaces_have_a_channel_for_each_op_in_flight(monkeypatch):
    """And one for the ops in line. Across hosts nothing runs beside those."""
    told = []
    library = types.SimpleNamespace(create_group=lambda *args: told.append(args[8]))
    monkeypatch.setattr(gpu_side, "library", lambda: library)
    rank = gpu_side.Rank(process=jax.process_index(), device=0, ordinal=0)
    for in_flight in 1, 3:
        one_host = Topology(((0,),), ((rank.process,),))
        gpu_side.create(1, [[rank]], one_host, 1.0, Room(in_flight))
    assert told == [2, 4]
    assert gpu_side.num_channels(Topology(((0,), (1,)), ((0, 1),)), 3) == 1


def test_axis_types_do_not_matter(backend):
    group = jax_ep.create_group(make_mesh(2, axis_type=AxisType.Explicit), backend=backend)
    assert group.size == 2


@pytest.mark.parametrize(
    "axes", ["b", "a", ("a", "b"), ("b", "a"), ("c", "a"), ("a", "b", "c")], ids=str
)
def test_programs_and_groups_place_ranks_alike(axes):
    """On GPUs, kernels compare the two places and take a difference for a mesh in another order."""
    need_devices(12)
    mesh = make_mesh((2, 3, 2), ("a", "b", "c"))
    group = jax_ep.create_group(mesh, axes, backend="reference")
    places = shard(
        lambda: calls.coords(group)[None], mesh, in_specs=(), out_specs=P(mesh.axis_names)
    )
    found = np.asarray(jax.jit(places)()).reshape(*mesh.devices.shape, 2)
    instances = create._instances(mesh, mesh.devices, group.axis_names)
    for instance, rank in np.ndindex(*instances.shape):
        [at] = np.argwhere(mesh.devices == instances[instance, rank])
        assert found[tuple(at)].tolist() == [rank, instance]


@pytest.mark.parametrize(
    ("channels", "error", "text"),
    [
        (
            0,
            ValueError,
            "argument channels: expected 1 to 3 ops in flight at once, got 0; .*after=",
        ),
        (4, ValueError, "argument channels: expected 1 to 3 ops in flight at once, got 4; "),
        ("2", TypeError, "argument channels: expected a Python int, got str; "),
        (True, TypeError, "argument channels: expected a Python int, got bool; "),
    ],
)
def test_wrong_channels(channels, error, text):
    with pytest.raises(error, match="jax_ep.create_group: " + text):
        jax_ep.create_group(make_mesh(2), "expert", channels=channels)


def test_channels_fit_the_workspace():
    cuda = pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
    assert cuda.limits()["max_channels"] == MOST_CHANNELS + 1
    one = cuda.workspace_bytes(1)
    assert cuda.workspace_bytes(3) == 3 * one
    assert round(one / 2**20) == 45  # as create_group says


def test_workspace_of_a_group_without_options():
    cuda = pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
    group = jax_ep.create_group(make_mesh(2), "expert", backend="reference")
    assert group.channels == 1 and group.latency_tokens == 0
    channels = gpu_side.num_channels(group.topology, group.channels)
    assert native.workspace_bytes(dataclasses.replace(group, backend="cuda")) <= 90 * 2**20
    assert cuda.workspace_bytes(channels, 2) == cuda.workspace_bytes(channels)


def test_an_inbox_for_each_channel_follows_the_channels():
    cuda = pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
    inbox = cuda.workspace_bytes(1, 2, 512, 7168) - cuda.workspace_bytes(1)
    assert inbox == 32 * (6 * 2 * 512 + 512 * (152 * 8 + 16)) + 4224  # as create_group says
    assert cuda.workspace_bytes(4, 2, 512, 7168) == cuda.workspace_bytes(4) + 4 * inbox
