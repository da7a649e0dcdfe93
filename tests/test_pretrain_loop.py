"""The loop of ``examples/pretrain``, with a model that compiles in a second."""

from __future__ import annotations

import bigram_trainer  # isort: skip  (first: it puts the repository on the path)

import html.parser
import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tensorboardX.proto.event_pb2 import Event

import jax_ep
import performance_page
import pretrain_texts
from examples.pretrain import flops, metrics
from examples.pretrain.data import Rows
from examples.pretrain.loop import DivergedError, Loop, Options
from examples.pretrain.resume import find_checkpoint
from spmd import ranks_at_most

pytestmark = pytest.mark.one_process("trains in this process")

DEVICES = ranks_at_most(8)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    folder = pretrain_texts.make_rows(tmp_path_factory.mktemp("data") / "rows")
    return Rows(folder, seq_len=16, vocab_size=pretrain_texts.VOCAB)


def make(rows, out, *changes, devices=DEVICES, bad_steps=(), **options) -> Loop:
    config = bigram_trainer.config(*changes)
    setup = bigram_trainer.setup(config, jax.devices()[:devices], bad_steps=bad_steps)
    return Loop(config, setup, rows, Options(out=out, **options))


def losses(out: pathlib.Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory) -> pathlib.Path:
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    with make(rows, out, command="a test") as loop:
        assert loop.train() == 0
        loop.finish()
    return out


def stop_after(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process in the middle of a step."""
    inner = Loop._train_step

    def train_step(self):
        inner(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "_train_step", train_step)


def test_a_run_learns_and_leaves_its_results(whole):
    curve = losses(whole)
    assert list(curve) == list(range(1, 9))
    assert curve[8] < curve[1] - 0.5
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(held_out) == [4, 8] and held_out[8] < held_out[4]
    assert all(0 <= line["goodput"] < 1 for line in lines if "goodput" in line)
    (last,) = (line for line in lines if line["step"] == 8 and "loss" in line)
    assert last["tokens_per_second"] > 0 and "mfu" not in last  # CPUs have no known peak
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["4", "8"]


def test_report_has_every_picture_and_setting(whole):
    class Reader(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.pictures: list[str] = []
            self.text = ""

        def handle_starttag(self, tag, attributes):
            if tag == "img":
                assert dict(attributes)["src"].startswith("data:image/png;base64,iVBOR")
                self.pictures.append(dict(attributes)["alt"])

        def handle_data(self, data):
            self.text += data + " "

    reader = Reader()
    reader.feed((whole / "report.html").read_text())
    assert len(reader.pictures) == 5 and "Loss" in reader.pictures
    assert "optimizer.peak_lr 0.3" in " ".join(reader.text.split())
    assert "held-out loss" in reader.text


def test_the_record_has_what_the_lines_say_and_fits_the_results(whole):
    """It is a file of ``benchmarks/results/`` as it is, and the pages there can be made with it."""
    (found,) = performance_page.data.load_results(whole)
    assert found["loss"] == [[step, loss] for step, loss in losses(whole).items()]
    assert [step for step, _ in found["held_out_loss"]] == [4, 8]
    assert found["steps"] == 8 and found["steps_per_line"] == 1 and found["num_skipped"] == 0
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name, figure in (
        ("tokens_per_second", found["tokens_per_second"]),
        ("step_seconds", found["step_ms"]["median"] / 1e3),
    ):
        assert figure == pytest.approx(np.median([line[name] for line in lines if name in line]))
    assert found["step_ms"]["p10"] <= found["step_ms"]["median"] <= found["step_ms"]["p90"]
    assert found["mfu"] is None and found["device"] == "cpu" and found["devices"] == DEVICES
    assert found["weights"] == 304 * 304 and found["settings"]["optimizer"]["peak_lr"] == 0.3
    assert found["versions"]["jax"] == jax.__version__ and found["command"] == "a test"
    results = [performance_page.record(), found]
    performance_page.page.render(
        performance_page.page.TEMPLATE.read_text(), performance_page.targets, results
    )


def test_tensorboard_has_the_same_losses(whole):
    (path,) = (whole / "tensorboard").iterdir()
    content, found = path.read_bytes(), {}
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            if value.tag == "loss":
                found[event.step] = value.simple_value
        content = content[16 + length :]
    expected = losses(whole)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("devices", [DEVICES, DEVICES // 2], ids=["as many", "half as many"])
def test_a_signal_saves_and_a_resumed_run_goes_on(rows, whole, tmp_path, monkeypatch, devices):
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with make(rows, tmp_path) as loop:
            assert loop.train() == signal.SIGTERM
            assert loop.step == 6
    with make(rows, tmp_path, devices=devices, resume=True) as loop:
        assert loop.step == 6
        assert loop.train() == 0
    expected = losses(whole)
    got = losses(tmp_path)
    assert list(got) == list(expected)
    if devices == DEVICES:
        assert got == expected
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_lines_after_the_checkpoint_are_dropped_and_their_time_is_lost(rows, tmp_path):
    with make(rows, tmp_path) as loop:
        loop.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines.append({"step": 11, "loss": 0.0, "up_seconds": 1e6})  # of a process that was killed
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    changes = ("optimizer.total_steps=10",)
    with make(rows, tmp_path, *changes, resume=True, allow_changes=True) as loop:
        loop.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert lines[-1]["up_seconds"] > 1e6 and lines[-1]["goodput"] < 1e-3


def test_goodput_counts_the_time_before_the_loop_and_the_last_save(rows, tmp_path):
    with make(rows, tmp_path, started=time.perf_counter() - 1e6) as loop:
        loop.train()
        lines = [line for line in loop.log.lines if "goodput" in line]
    assert all(line["up_seconds"] > 1e6 and line["goodput"] < 1e-3 for line in lines)
    assert [line["step"] for line in lines[-2:]] == [8, 8]  # the last step, and after the save
    assert lines[-1]["up_seconds"] > lines[-2]["up_seconds"]


def test_a_process_that_is_killed_while_it_opens_the_lines_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics.Log(tmp_path, first_step=1)
    assert list(losses(tmp_path)) == [1, 2]
    metrics.Log(tmp_path, first_step=1).close()
    assert list(losses(tmp_path)) == [1]


@pytest.mark.parametrize(("first", "mine"), [(8, None), (8, 4), (-1, 8)])
def test_all_processes_go_on_from_what_the_first_one_sees(tmp_path, monkeypatch, first, mine):
    """A shared file system may not show the newest checkpoint to all hosts at once."""
    if mine is not None:
        (tmp_path / "checkpoints" / str(mine)).mkdir(parents=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: np.int32(first))
    assert find_checkpoint(tmp_path, resume=True) == (None if first < 0 else first)


def test_steps_that_are_not_finite_are_skipped(rows, whole, tmp_path):
    with make(rows, tmp_path, bad_steps=(3, 5)) as loop:
        assert loop.train() == 0
        checks = loop._setup.group.num_checks
    assert set(losses(tmp_path)) == {1, 2, 4, 6, 7, 8}
    assert loop.log.last("num_skipped")["num_skipped"] == 2
    assert checks >= 8 + 2  # at every step, and before both saves
    assert losses(tmp_path)[2] == losses(whole)[2]


def test_many_in_a_row_end_the_run_without_a_checkpoint_of_them(rows, tmp_path):
    changes = ("optimizer.total_steps=30", "run.save_every=30")
    with make(rows, tmp_path, *changes, bad_steps=range(3, 30)) as loop:
        with pytest.raises(
            DivergedError, match="the last 10 steps, up to step 12, had a loss or gra"
        ):
            loop.train()
        assert loop._checkpoints.latest() is None


@pytest.mark.parametrize("bad_steps", [(), (5,)], ids=["before a save", "before a skip"])
def test_a_failed_group_ends_the_run(rows, tmp_path, monkeypatch, bad_steps):
    """It gives NaN, which is no reason to skip a step, and no state to save."""
    inner = Loop._train_step

    def train_step(self):
        if self.step == 4:
            self._setup.group.failed = True
        inner(self)

    monkeypatch.setattr(Loop, "_train_step", train_step)
    with make(rows, tmp_path, "run.save_every=5", bad_steps=bad_steps) as loop:
        with pytest.raises(jax_ep.CommunicationError):
            loop.train()
        assert loop._checkpoints.latest() is None
        assert not (loop.log.last("num_skipped") or {}).get("num_skipped")


def test_a_run_by_time_ends_with_a_checkpoint(rows, tmp_path):
    with make(rows, tmp_path, "optimizer.total_steps=1000000", minutes=0.002) as loop:
        assert loop.train() == 0
        assert 1 <= loop.step < 1_000_000
        assert loop._checkpoints.latest() == loop.step


def test_a_folder_with_checkpoints_needs_a_word(rows, whole, tmp_path):
    with pytest.raises(
        FileExistsError, match=r"which has one of step 8; pass --resume to go on from"
    ):
        make(rows, whole)
    changes = ("optimizer.b1=0.8", "run.seed=1")
    with pytest.raises(
        ValueError, match=r"got others: b1 was 0.9, is 0.8, seed was 0, is 1; --allow"
    ):
        make(rows, whole, *changes, resume=True)
    with make(rows, tmp_path, resume=True) as loop:  # nothing to go on from
        assert loop.step == 0
    with make(rows, whole, "parallel.data=2", "run.log_every=3", resume=True) as loop:
        assert loop.step == 8  # these are free


def test_profiles_of_chosen_steps_and_now_and_then(rows, tmp_path, capsys):
    """One is kept. This model has no op of jax_ep, so both say that they have no shares."""
    changes = ("optimizer.total_steps=3", "run.profile_every=3")
    with make(rows, tmp_path, *changes, profile=(2, 2)) as loop:
        loop.train()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    text = capsys.readouterr().out
    for step in (2, 3):
        assert f"step {step}/3: the profile has no op of jax_ep, so there are no shares" in text
    assert loop.log.last("exchange_share") is None


def test_a_line_covers_the_steps_since_the_last_one():
    window = metrics.Window(flops_per_token=10.0, peak_flops=1000.0)
    step = {"loss": 2.0, "tokens": 30, "skipped": 0, "num_dropped": 5, "load": np.array([[10, 10]])}
    step |= {"aux_loss": 0.0, "grad_norm": 1.0, "load_entropy": 0.5}
    window.add(step)
    window.add(step | {"loss": 4.0, "tokens": 10, "num_dropped": 0, "load": np.array([[0, 20]])})
    window.add(step | {"loss": np.nan, "skipped": 1})
    line = window.line(seconds=2.0)
    assert line["loss"] == 2.5 and line["dropped"] == 5 / 40 and line["num_skipped"] == 1
    assert line["tokens_per_second"] == 35 and line["mfu"] == 0.35
    assert line["step_seconds"] == 2.0 / 3
    assert line["load"] == [[0, 20]] and window.num_skipped_in_a_row == 1
    assert (
        metrics.figures_text(line)
        == "loss 2.5000, 35 tokens/s, MFU 35.0%, 12.5% dropped, 1 skipped"
    )
    window.add(step)
    window.start_clock()
    window.add(step | {"tokens": 20})
    line = window.line(seconds=3.0)
    assert line["tokens_per_second"] == 20 and line["loss"] == 2.0 and line["step_seconds"] == 1.0
    window.add(step | {"skipped": 1})
    line = window.line(seconds=4.0)
    assert "loss" not in line and metrics.figures_text(line).startswith("all steps skipped, 30 tok")


def test_operations_of_a_token():
    """Of DeepSeek-V3: 37 billion active weights (arXiv:2412.19437), with embedding or head."""
    from examples.pretrain.config import load

    model = load("671b", ["model.mtp=false"]).model
    active = flops.active_weights(model)
    assert 36e9 < active < 37.5e9
    attention = 61 * 128 * (192 + 128) * 4096 / 2  # multiply-adds with half of the square
    assert flops.flops_per_token(model, seq_len=4096) == 6 * (active + attention)
    assert flops.active_weights(load("671b").model) > active
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("cpu") is None
