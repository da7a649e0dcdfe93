"""What is tuned: the defaults, the cache and how a group uses it, the search. Needs no GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

import jax_ep
from conftest import PLATFORM
from jax_ep import _compat, tune
from jax_ep._backends import calls
from jax_ep._groups import tuning
from jax_ep._groups.group import sms_of
from jax_ep._groups.tuning import CrossoverKey, Key
from jax_ep.bench.cases import Case
from spmd import make_group as make_real_group
from spmd import run_python
from tuning_records import record

KEY = Key("cpu", 2, "dispatch", "token", "bfloat16", 7168, 4096)
CROSSOVER = CrossoverKey("cpu", 2, "dispatch", "token", "bfloat16", 7168)


def entry(num_sms=20, **changes):
    fields = {**dataclasses.asdict(KEY), "num_sms": num_sms, "median_us": 187.0}
    return {**fields, "versions": {"jax_ep": jax_ep.__version__}, **changes}


def crossover(most_tokens=64, **changes):
    fields = {**dataclasses.asdict(CROSSOVER), "most_tokens": most_tokens}
    return {**fields, "versions": {"jax_ep": jax_ep.__version__}, **changes}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "tuning.json"
    monkeypatch.setenv("JAX_EP_TUNING_CACHE", str(path))
    monkeypatch.setattr(tuning, "_warned", set())
    return path


def make_group(backend="cuda", tuning=None):
    """A group of CPU devices that behaves like one of GPUs."""
    group = make_real_group(2, "reference")
    return dataclasses.replace(group, backend=backend, tuning=tuning or {})


@pytest.fixture(autouse=True)
def gpus_have_132_sms(monkeypatch):
    monkeypatch.setattr(_compat, "multiprocessor_count", lambda device: 132)


def num_sms(group, **changes):
    arguments = {"op": "dispatch", "layout": "token", "rows": "bfloat16", "hidden": 7168}
    return sms_of(group, **{**arguments, "num_tokens": 4096, **changes})


def test_default_leaves_32_sms():
    assert tuning.default_num_sms("expert", 132) == 64
    assert tuning.default_num_sms("token", 132) == 24
    assert tuning.default_num_sms("expert", 78) == 46
    assert tuning.default_num_sms("token", 40) == 8
    assert tuning.default_num_sms("token", 16) == 2
    assert tuning.default_num_sms("expert", None) == 64


def test_what_is_asked_for_comes_first_then_the_table_then_the_default():
    tuned = make_group(tuning={KEY: 20})
    assert num_sms(tuned, requested=33) == 33
    assert num_sms(tuned) == 20
    assert num_sms(tuned, num_tokens=2049) == 20  # the same bucket
    for change in ({"num_tokens": 2048}, {"op": "combine"}, {"rows": "float16"}, {"hidden": 4096}):
        assert num_sms(tuned, **change) == 24, change
    assert num_sms(tuned, layout="expert") == 64
    assert num_sms(make_group(tuning={KEY: 120})) == 100  # 32 stay free, whatever a cache says
    assert num_sms(make_group("cpu", tuning={KEY: 20}), requested=33) == 0
    two_hosts = dataclasses.replace(tuned.topology, hosts=((0,), (1,)))
    assert num_sms(dataclasses.replace(tuned, topology=two_hosts)) == 24  # found for one host


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 1), (1, 1), (3, 4), (128, 128), (129, 256)])
def test_buckets(tokens, bucket):
    assert tuning.tokens_bucket(tokens) == bucket


def test_attributes_carry_the_number():
    group = make_group(tuning={KEY: 20})
    attributes = functools.partial(
        calls.attributes,
        group,
        8,
        "token",
        op="dispatch",
        num_tokens=4096,
        hidden=7168,
        rows=tuning.rows_name("bfloat16"),
    )
    assert attributes(None)["num_sms"] == 20
    assert attributes(jax_ep.DispatchConfig(num_sms=8))["num_sms"] == 8


def test_cache_round_trip(cache):
    assert tuning.load() == {}
    tuning.save(cache, [entry(), entry(16, layout="expert")])
    assert tuning.load() == {KEY: 20, dataclasses.replace(KEY, layout="expert"): 16}
    assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]
    tuning.save(cache, [entry()], [crossover(), crossover(0, op="combine")])
    combine = dataclasses.replace(CROSSOVER, op="combine")
    assert tuning.load() == {KEY: 20, CROSSOVER: 64, combine: 0}
    tuning.save(cache, [], [crossover()])
    assert tuning.load() == {CROSSOVER: 64}


def test_caches_without_crossovers_are_read(cache):
    """Those of versions without latency mode."""
    cache.parent.mkdir()
    cache.write_text(json.dumps({"format": 1, "entries": [entry()]}))
    assert tuning.load() == {KEY: 20}
    assert tuning.contents_of(cache.read_text()).crossovers == []


def test_cache_path(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_EP_TUNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "jax_ep" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / ".cache" / "jax_ep" / "tuning.json"


BAD = {
    "it is not JSON": "{",
    "it is no cache of format 1": '{"format": 2, "entries": []}',
    "it has no list of entries": '{"format": 1}',
    "not the fields of a key": json.dumps({"format": 1, "entries": [entry(ranks="two")]}),
    "no positive number": json.dumps({"format": 1, "entries": [entry(0)]}),
    "no list of crossovers": '{"format": 1, "entries": [], "crossovers": 1}',
    "not the fields of a key: {'most_tokens'": json.dumps(
        {"format": 1, "entries": [], "crossovers": [{"most_tokens": 1}]}
    ),
    "no number of tokens": json.dumps({"format": 1, "entries": [], "crossovers": [crossover(-1)]}),
    "which jax_ep it is for": json.dumps({"format": 1, "entries": [entry(versions={})]}),
    "it was made for jax_ep 0.0.0": json.dumps(
        {"format": 1, "entries": [entry(versions={"jax_ep": "0.0.0"})]}
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_caches_are_ignored_with_one_warning(cache, caplog, reason):
    cache.parent.mkdir()
    cache.write_text(BAD[reason])
    with caplog.at_level(logging.WARNING, "jax_ep"):
        assert tuning.load() == {} == tuning.load()
    assert len(caplog.records) == 1
    text = caplog.text
    assert reason in text and str(cache) in text and "python -m jax_ep.tune" in text


def test_bytes_that_are_no_text(cache, caplog):
    cache.parent.mkdir()
    cache.write_bytes(b"\xff\xfe\x00")
    assert tuning.load() == {}
    assert len(caplog.records) == 1


WORKER = """
import sys
import jax, jax_ep
from jax_ep._groups import tuning
address, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, index, coordinator_bind_address=address if index == 0 else None)
mesh = jax.sharding.Mesh(jax.devices(), ("expert",))
assert mesh.size == 2
table = tuning.agreed_table(mesh, "test")
print(sorted((type(key).__name__, key.device_kind, value) for key, value in table.items()))
jax.distributed.shutdown()
"""


@pytest.mark.skipif(PLATFORM != "cpu", reason="starts processes on CPU")
def test_processes_take_the_table_of_rank_0(tmp_path, monkeypatch):
    """The caches of their hosts may differ."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    root = pathlib.Path(jax_ep.__file__).parent.parent
    workers = []
    for index in range(2):
        path = tmp_path / f"{index}.json"
        host = {"device_kind": f"host {index}"}
        tuning.save(path, [entry(20 + index, **host)], [crossover(64 + index, **host)])
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_EP_TUNING_CACHE": str(path),
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]),
        }
        command = [sys.executable, "-c", WORKER, address, str(index)]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert outputs == ["[('CrossoverKey', 'host 0', 64), ('Key', 'host 0', 20)]"] * 2


def test_search_takes_the_fewest_sms_that_are_as_good():
    found = tune.best_entries(
        [
            record(8, 300.0),
            record(16, 201.0),
            record(24, 199.0),
            record(12, 100.0, correct=False),
            record(10, None),
            record(4, 50.0, name="reference"),
            record(32, 150.0, quantization="fp8"),
            record(32, 1.0, op="ceiling"),
            record(2, 1.0, mode="latency"),
            record(2, 1.0, mode="throughput"),
        ]
    )
    assert [(e["num_sms"], e["rows"], e["tokens"]) for e in found] == [
        (16, "bfloat16", 4096),
        (32, "bfloat16 as fp8", 4096),
    ]
    assert tuning.key_of(found[0]) == KEY
    kept = tuning.Contents(
        [entry(99), entry(98, device_kind="other")], [crossover(1), crossover(2, op="combine")]
    )
    merged = tune.merged(kept, tuning.Contents(found, [crossover(3)]))
    assert [e["num_sms"] for e in merged.entries] == [98, 16, 32]
    assert [e["most_tokens"] for e in merged.crossovers] == [2, 3]


def test_a_search_that_is_ended_has_written_what_it_finished(cache, monkeypatch):
    """The cache gets an op once all of its candidates are measured, right or wrong."""

    def measure(job, *, save, **_):
        combine = record(16, 1.0, op="combine")
        for found in (
            [record(16, 5.0)],
            [record(16, 5.0), record(24, None)],
            [record(16, 5.0), record(24, None), combine],
        ):
            save(found)
            saved.append(set(tuning.load()) if cache.exists() else set())
        raise KeyboardInterrupt

    saved = []
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "count_gpus", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        tune.main(tokens="4096", num_sms="16,24", quantization="none", layout="token", crossover="")
    assert saved == [set(), {KEY}, {KEY}]


def test_search_covers_what_makes_sense():
    cases = tune.cases_of(
        Case(),
        tokens=[128],
        hidden=[7168],
        layouts=["token"],
        dtypes=["bfloat16"],
        quantizations=["none", "fp8"],
        candidates=[8, 16],
    )
    assert [(c.op, c.quantization, c.num_sms) for c in cases] == [
        ("dispatch", "none", 8),
        ("dispatch", "none", 16),
        ("combine", "none", 8),
        ("combine", "none", 16),
        ("dispatch", "fp8", 8),
        ("dispatch", "fp8", 16),
    ]


@pytest.mark.skipif(PLATFORM != "cpu", reason="a GPU would be tuned")
def test_tuning_without_a_gpu_says_so():
    done = run_python("-m", "jax_ep.tune", timeout=120, JAX_PLATFORMS="cpu")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("on CPU the number of SMs has no meaning")
    assert jax.default_backend() == "cpu"


def test_search_writes_what_groups_read(cache, monkeypatch, capsys):
    """Everything except the measuring; a second search keeps entries that it does not replace."""
    asked = []

    def measure(job, **_):
        asked.extend(job.cases)
        return [
            record(
                c.num_sms,
                100.0 + (c.num_sms or c.tokens * {"latency": 2, "throughput": 1}[c.mode]),
                op=c.op,
                layout=c.layout,
                tokens=c.tokens,
                mode=c.mode,
            )
            for c in job.cases
        ]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "count_gpus", lambda: 2)
    search = functools.partial(tune.main, quantization="none", layout="token", crossover="")
    search(tokens="4096", num_sms="16,24")
    assert len(asked) == 4
    assert tuning.load() == {KEY: 16, dataclasses.replace(KEY, op="combine"): 16}
    search(tokens="128", num_sms="8")
    assert tuning.load()[KEY] == 16
    assert tuning.load()[dataclasses.replace(KEY, tokens=128)] == 8
    search(tokens="", num_sms="", crossover="1,64")  # modes only
    assert [tuning.load()[key] for key in (KEY, CROSSOVER)] == [16, 0]
    search(tokens="4096", num_sms="12")
    assert [tuning.load()[key] for key in (KEY, CROSSOVER)] == [12, 0]
    cache.write_text("{")
    search(tokens="4096", num_sms="12")
    assert tuning.load()[KEY] == 12
    assert CROSSOVER not in tuning.load()
    out = " ".join(capsys.readouterr().out.split())
    assert "is replaced" in out and "written to" in out
    assert "1: 102.0 / 101.0" in out
