"""Examples as programs: the devices they run on, wrong options, what fits on a screen, signals."""

from __future__ import annotations

import train_moe_cli  # noqa: F401  # isort: skip  (first: it puts examples/ on the path)

import contextlib
import io
import signal

import jax
import pytest
import typer
from rich.console import Console

import moe_layer
import train_moe
from byte_lm import cluster
from byte_lm.progress import figures_text
from common.interrupt import Interrupt
from common.progress import make_bar
from conftest import PLATFORM
from spmd import need_devices

pytestmark = pytest.mark.one_process("runs programs of one process")


@pytest.mark.parametrize("devices", [1, 4])
def test_moe_layer_takes_the_devices_that_are_there(monkeypatch, capsys, devices):
    need_devices(devices)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    moe_layer.main()
    ranks = max(devices // 2, 1)  # two groups side by side where there are four devices
    assert f"2 of {4 * ranks} experts each, on Group(expert={ranks}, " in capsys.readouterr().out


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit status of the training example in this process, and what it wrote to stderr."""
    app = typer.Typer()
    app.command()(train_moe.main)
    with pytest.raises(SystemExit) as end:
        app(list(options))
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--process-id", "5", "--num-processes", "1"), "--process-id: expected 0 to 0, less than"),
        (("--process-id", "1"), "--process-id: expected 0 to 0, less than --num-processes, got 1"),
        (("--num-processes", "2"), "--coordinator: expected host:port of process 0 where"),
        (("--coordinator", "localhost"), "--coordinator: expected host:port of process 0, got 'lo"),
        (("--coordinator", "localhost:99"), "--coordinator: expected --num-processes and"),
        (("--steps", "1", "--minutes", "1"), "--steps: expected either this or --minutes"),
        (("--devices", "999"), "--devices: expected 1 to "),
        (("--ranks-per-host", "5"), "--ranks-per-host: expected a divisor of the "),
        (("--data", "/dev/null/x"), "--data: expected a file or folder, got /dev/null/x"),
        (("--out", "/dev/null/x"), "--out: expected a folder that can be made, got /dev/null/x"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_are_one_line(capsys, options, text):
    devices = cluster.make_mesh(devices=None, data_parallel=None).size
    batch = ("--batch-size", str(devices), "--num-experts", str(devices))
    status, error = run(capsys, *batch, *options)
    assert status == 2
    assert error.startswith(f"train_moe.py: {text}") and error.count("\n") == 1, error


@pytest.mark.skipif(PLATFORM != "cpu", reason="GPUs have been taken before: JAX joins others first")
def test_processes_that_do_not_meet_are_one_line(capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED:\nnobody came")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    processes = ("--coordinator", "h:99", "--num-processes", "2", "--process-id", "1")
    status, error = run(capsys, *processes)
    assert status == 2
    assert error == (
        "train_moe.py: --coordinator: expected 2 processes to meet at h:99, got "
        "DEADLINE_EXCEEDED: nobody came\n"
    )


def test_a_signal_is_the_exit_status(monkeypatch, capsys):
    class Stopped(contextlib.nullcontext):
        def train(self):
            return int(signal.SIGTERM)

    monkeypatch.setattr(train_moe, "_make_run", lambda *_, **__: Stopped())
    assert run(capsys) == (143, "")


def test_a_second_signal_acts_as_usual(request):
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_progress_fits_into_80_columns():
    """The largest figures too, none of which rich may cut."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    figures = figures_text(loss=12.3456, bytes_per_second=987_654_321, dropped=1.0)
    with make_bar(console) as bar:
        bar.add_task("", completed=123_456, total=200_000, figures=figures)
    shown = screen.getvalue()
    assert "…" not in shown
    assert f"123456/200000 {figures}" in shown
    assert max(map(len, shown.replace("\r", "\n").splitlines())) <= 80
    assert len(f"step 123456/200000: held out 12.345, {figures}") <= 80
