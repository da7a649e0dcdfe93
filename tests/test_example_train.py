"""``examples/train_moe.py``: what it computes, that it learns, resumes and runs."""

from __future__ import annotations

import train_moe_cli  # isort: skip  (first: it puts examples/ on the path)

import dataclasses
import json
import pathlib
import shutil
import signal
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dense_moe
import jax_ep
from byte_lm import cluster, data
from byte_lm.config import ModelConfig, RunConfig, TrainConfig
from byte_lm.run import Run
from byte_lm.training import Figures, Trainer, TrainState, learning_rate, make_optimizer
from common import checkpoints, clock
from spmd import make_mesh, ranks_at_most

pytestmark = pytest.mark.one_process("trains in one process")

MODEL = ModelConfig(
    num_layers=2,
    hidden=32,
    num_heads=2,
    num_experts=8,
    top_k=2,
    expert_hidden=32,
    capacity_factor=None,
)
# Powers of two, as the experts and the batch are.
DEVICES = 1 << ranks_at_most(8).bit_length() - 1
GROUPS = 2 if DEVICES >= 4 else 1
TRAIN = TrainConfig(batch_size=16, seq_len=32, learning_rate=6e-3, warmup_steps=10)


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load(None, min_bytes=1000)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(dataclasses.replace(MODEL, balance="bias", capacity_factor=1.0))


def make_trainer(model: ModelConfig, train: TrainConfig = TRAIN) -> Trainer:
    make_mesh(DEVICES)  # or the test is skipped
    return Trainer(cluster.make_mesh(devices=DEVICES, data_parallel=GROUPS), model, train)


def batches(corpus: data.Corpus, steps: int) -> list[np.ndarray]:
    sizes = {"batch_size": TRAIN.batch_size, "seq_len": TRAIN.seq_len}
    return [corpus.batch(seed=TRAIN.seed, step=step, **sizes) for step in range(steps)]


def learning_rates(steps: int) -> list[np.float32]:
    return [learning_rate(TRAIN, step=step, total_steps=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(("warmup_steps", "steps"), [(10, 40), (0, 5), (10, 10), (50, 20)])
def test_learning_rate_is_the_schedule_of_optax(warmup_steps, steps):
    config = dataclasses.replace(TRAIN, warmup_steps=warmup_steps)
    peak = TRAIN.learning_rate
    warmup = min(warmup_steps, steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps + 1, 0.1 * peak)
    found = [learning_rate(config, step=n, total_steps=steps) for n in range(1, steps + 1)]
    np.testing.assert_allclose(found, schedule(np.arange(1, steps + 1)), rtol=1e-5)


def dense_losses(state: Any, corpus: data.Corpus, model: ModelConfig, steps: int) -> list[float]:
    """The loss curve of the dense model on one device, from the weights of ``state``."""
    params, buffers = jax.device_get(
        (nnx.to_pure_dict(state.params), nnx.to_pure_dict(state.buffers))
    )
    optimizer = make_optimizer(TRAIN)
    aux_weight = TRAIN.aux_weight if model.balance == "aux" else 0.0

    def objective(params: Any, biases: Any, batch: jax.Array) -> Any:
        report = dense_moe.loss(params, biases, batch, num_heads=model.num_heads, top_k=model.top_k)
        return report.loss + aux_weight * report.aux_loss, report

    @jax.jit
    def step(params: Any, biases: Any, opt_state: Any, batch: jax.Array, rate: jax.Array) -> Any:
        grads, report = jax.grad(objective, has_aux=True)(params, biases, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        for index, bias in enumerate(biases):
            if bias is not None:
                load = report.load[index]
                biases[index] = bias + 1e-3 * jnp.sign(load.mean() - load)
        return params, biases, opt_state, report.loss

    blocks = range(model.num_layers)
    if model.balance == "bias":
        biases = [buffers["blocks"][index]["experts"]["router_bias"] for index in blocks]
    else:
        biases = [None for _ in blocks]
    opt_state = optimizer.init(params)
    losses = []
    for batch, rate in zip(batches(corpus, steps), learning_rates(steps), strict=True):
        params, biases, opt_state, value = step(params, biases, opt_state, batch, rate)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize("balance", [pytest.param("aux", marks=pytest.mark.slow), "bias"])
def test_loss_curve_is_that_of_a_dense_model(corpus, balance):
    steps = 30
    model = dataclasses.replace(MODEL, balance=balance)
    trainer = make_trainer(model)
    state = trainer.initial_state()
    expected = dense_losses(state, corpus, model, steps)
    losses = []
    for batch, rate in zip(batches(corpus, steps), learning_rates(steps), strict=True):
        state, figures = trainer.step(state, trainer.put(batch), rate)
        losses.append(float(figures.loss))
        assert figures.dropped == 0
        assert figures.load.sum() == model.num_layers * model.top_k * batch[:, 1:].size
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 1


def test_experts_are_split_over_the_mesh(trainer):
    state = trainer.initial_state()
    block = nnx.to_pure_dict(state.params)["blocks"][0]
    gate = block["experts"]["gate"]
    local_experts = MODEL.num_experts * GROUPS // DEVICES
    assert {shard.data.shape for shard in gate.addressable_shards} == {(local_experts, 32, 32)}
    assert block["attention"]["out"]["kernel"].sharding.is_fully_replicated
    assert nnx.to_pure_dict(state.opt_state[1][0].mu)["blocks"][0]["experts"]["gate"].sharding == (
        gate.sharding
    )


@pytest.mark.slow
def test_learns_more_than_byte_frequencies(trainer, corpus, tmp_path):
    with Run(trainer, corpus, RunConfig(out=tmp_path, steps=100)) as run:
        run.train()
        summary = run.finish()
    assert summary.held_out_loss < summary.unigram_loss - 0.2
    assert summary.steps == 100
    assert summary.bytes_per_second > 0


def test_resumed_run_has_the_same_bits(trainer, corpus, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    config = RunConfig(out=whole, steps=12, checkpoint_every=6)
    with Run(trainer, corpus, config) as run:
        run.train()
        summary = run.finish()
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "12")
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # as of a process that was killed
    config = dataclasses.replace(config, out=half, steps=None, resume=True)
    with Run(trainer, corpus, config) as resumed:
        assert resumed.step == 6
        resumed.train()
        again = resumed.finish()
    assert jax.tree.structure(resumed.state) == jax.tree.structure(run.state)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, run.state)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(resumed.state.buffers))
    assert (half / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (again.held_out_loss, again.sample) == (summary.held_out_loss, summary.sample)


def test_failed_group_ends_the_run(trainer, corpus, tmp_path, monkeypatch):
    """The run ends with the group's error, before it records losses or saves states with NaN."""
    calls = []

    def check(group):
        calls.append(group)
        if len(calls) > 2:
            raise jax_ep.CommunicationError("rank 1 did not come")

    monkeypatch.setattr(jax_ep.Group, "check", check)
    with (
        Run(trainer, corpus, RunConfig(out=tmp_path, steps=4)) as run,
        pytest.raises(jax_ep.CommunicationError, match="rank 1 did not come"),
    ):
        run.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 1]  # its figures and its evaluation
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    with pytest.raises(jax_ep.CommunicationError):
        trainer.held_out_loss(trainer.initial_state(), batches(corpus, 1))
    with pytest.raises(jax_ep.CommunicationError):
        run._sample()


@pytest.fixture(scope="module")
def first_state(trainer) -> TrainState:
    return trainer.initial_state()


class Steps:
    """Replaces the steps of a trainer, so that they compute nothing, and the clock.

    Attributes:
        take: Seconds from one step's end to the next. Time passes only in steps.
        rates: The learning rates of all steps so far.
        before: A function that is called before each step.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, trainer: Trainer, first_state: TrainState
    ) -> None:
        self.take, self.rates, self._now = 1.0, [], 0.0
        self.before = lambda: None
        time = types.SimpleNamespace(perf_counter=lambda: self._now)
        monkeypatch.setattr(clock, "time", time)
        monkeypatch.setattr(trainer, "initial_state", lambda: first_state)
        monkeypatch.setattr(trainer, "step", self._step)
        monkeypatch.setattr(trainer, "held_out_loss", lambda *_: 1.0)
        monkeypatch.setattr(trainer, "check", self._end)  # is called when a step has ended

    def _step(self, state: TrainState, _: Any, rate: Any) -> tuple[TrainState, Figures]:
        self.rates.append(rate)
        self.before()
        return state, Figures(np.float32(1), np.ones(MODEL.num_experts, np.int32), np.float32(0))

    def _end(self) -> None:
        self._now += self.take


@pytest.fixture
def steps(monkeypatch, trainer, first_state) -> Steps:
    return Steps(monkeypatch, trainer, first_state)


def test_minutes_hold_under_changing_load(trainer, corpus, tmp_path, steps):
    """Steps that take four times as long from the 30th on: fewer of them, in the same minute."""

    def slow_down():
        steps.take = 1.0 if len(steps.rates) < 30 else 4.0

    steps.before = slow_down
    with Run(trainer, corpus, RunConfig(out=tmp_path, minutes=1.0)) as run:
        assert run.train() == 0
        assert run.step == run.total_steps == len(steps.rates)
        assert abs(run._clock.seconds() - 60) <= 2 * steps.take
    assert 33 <= len(steps.rates) <= 40
    assert steps.rates[-1] < 0.2 * TRAIN.learning_rate  # the schedule ends where the run does
    # A resumed run has the rest of its minutes. Here none are left, until it is given more.
    with Run(trainer, corpus, RunConfig(out=tmp_path, resume=True)) as again:
        again.train()
        assert again.step == run.step
    with Run(trainer, corpus, RunConfig(out=tmp_path, minutes=1.5, resume=True)) as longer:
        longer.train()
        assert longer.step > run.step
        assert abs(longer._pace.seconds() - 90) <= 2 * steps.take
        assert abs(longer._clock.seconds() - 30) <= 2 * steps.take  # of this part alone


def test_checkpoints_come_every_minute(trainer, corpus, tmp_path, monkeypatch, steps):
    """By default, however slow the steps are: a run that is killed loses no more than that."""
    steps.take = 25.0
    saved = []
    save = checkpoints.Checkpoints.save

    def note(self, step, *args):
        saved.append(step)
        save(self, step, *args)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", note)
    with Run(trainer, corpus, RunConfig(out=tmp_path, steps=12)) as run:
        run.train()
    # The first step is not timed, then three make a minute, and one has been under way meanwhile.
    assert saved == [5, 9, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_saves_and_says_so(trainer, corpus, tmp_path, capsys, steps, number):
    steps.before = lambda: signal.raise_signal(number) if len(steps.rates) == 3 else None
    handler = signal.getsignal(number)
    with Run(trainer, corpus, RunConfig(out=tmp_path, steps=5)) as run:
        assert run.train() == number
    assert signal.getsignal(number) is handler
    assert checkpoints.newest(tmp_path / "checkpoints") == 3
    assert len(train_moe_cli.losses(tmp_path)) == 3
    said = capsys.readouterr().out
    assert f"{number.name}: stopped after step 3 and saved it in {tmp_path}" in said
    with Run(trainer, corpus, RunConfig(out=tmp_path, resume=True)) as resumed:
        assert (resumed.step, resumed.train(), resumed.step) == (3, 0, 5)


def test_refuses_what_would_mix_runs(trainer, corpus, tmp_path, steps):
    config = RunConfig(out=tmp_path / "new" / "out", steps=1)
    with pytest.raises(FileNotFoundError, match="--resume: expected a checkpoint in"):
        Run(trainer, corpus, dataclasses.replace(config, resume=True))
    assert not list(tmp_path.iterdir())  # a resumption that fails leaves nothing behind
    with Run(trainer, corpus, config) as run:
        run.train()
    files = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    with pytest.raises(FileExistsError, match="which has one of step 1; pass --resume"):
        Run(trainer, corpus, config)
    other = dataclasses.replace(corpus, held_out=corpus.held_out[1:])
    with pytest.raises(ValueError, match="got others: text is another"):
        Run(trainer, other, dataclasses.replace(config, resume=True))
    assert files == {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}


def test_errors_name_the_option(trainer, corpus, tmp_path):
    with pytest.raises(ValueError, match="--prompt: expected 1 to 31 bytes"):
        Run(trainer, corpus, RunConfig(out=tmp_path, prompt="p" * 32))
    with pytest.raises(ValueError, match=r"--out: .* got /dev/null/x: Not a directory"):
        Run(trainer, corpus, RunConfig(out=pathlib.Path("/dev/null/x")))
    with pytest.raises(ValueError, match="--steps: expected either this or --minutes"):
        RunConfig(steps=1, minutes=1.0)
    with pytest.raises(ValueError, match=f"--batch-size: .* multiple of {DEVICES}, the dev"):
        make_trainer(MODEL, dataclasses.replace(TRAIN, batch_size=DEVICES + 1))
    ranks = DEVICES // GROUPS
    with pytest.raises(ValueError, match=f"--num-experts: .* multiple of {ranks}, the ranks"):
        make_trainer(dataclasses.replace(MODEL, num_experts=ranks + 1))
    with pytest.raises(ValueError, match="--hidden: expected a positive multiple of 6, twice"):
        make_trainer(dataclasses.replace(MODEL, num_heads=3))


def test_data_depends_on_names_seed_and_step_alone(tmp_path):
    for name in ("b.txt", "a/c.txt", "tests/d.txt", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name} " * 20)
    (tmp_path / "picture.bin").write_bytes(b"\x00\xff" * 500)
    corpus = data.load(tmp_path, min_bytes=33)
    text = (corpus.train.tobytes() + corpus.held_out.tobytes()).decode()
    assert text == "the text of a/c.txt " * 20 + "\n" + "the text of b.txt " * 20
    first = corpus.batch(seed=1, step=2, batch_size=4, seq_len=16)
    assert first.shape == (4, 17)
    assert first[0].astype(np.uint8).tobytes() in corpus.train.tobytes()
    np.testing.assert_array_equal(first, corpus.batch(seed=1, step=2, batch_size=4, seq_len=16))
    assert (first != corpus.batch(seed=1, step=3, batch_size=4, seq_len=16)).any()
    assert (first != corpus.batch(seed=2, step=2, batch_size=4, seq_len=16)).any()
    with pytest.raises(ValueError, match="expected at least 20000 bytes of UTF-8 text"):
        data.load(tmp_path, min_bytes=10_000)
    with pytest.raises(FileNotFoundError, match="expected a file or folder"):
        data.load(tmp_path / "absent", min_bytes=1)


def test_whole_files_are_held_out(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.txt").write_text(f"[{index}]" * 10)
    corpus = data.load(tmp_path, min_bytes=10)
    train, held_out = (part.tobytes().split(b"\n") for part in (corpus.train, corpus.held_out))
    assert sorted(train + held_out) == sorted(f"[{index}]".encode() * 10 for index in range(60))
    assert 0 < len(held_out) < 10
    windows = np.concatenate(list(corpus.held_out_batches(num_batches=3, batch_size=2, seq_len=8)))
    assert windows.shape == (6, 9)
    np.testing.assert_array_equal(windows[0], corpus.held_out[:9])
    np.testing.assert_array_equal(windows[-1], corpus.held_out[-9:])


def test_command_line(tmp_path):
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("a small text, again and again. " * 200)
    arguments = (
        f"{train_moe_cli.TINY} --devices {DEVICES // GROUPS} --steps 3 --dtype bf16 --prompt again"
    )
    process = train_moe_cli.start(arguments, data=text, out=out)
    output = train_moe_cli.finish([process], timeout=200)[0]
    assert "held-out loss" in output
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("again")
    assert json.loads((out / "summary.json").read_text())["steps"] == 3
    assert len(train_moe_cli.losses(out)) == 3
