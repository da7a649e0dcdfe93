"""``examples/decode_moe.py`` writes what the model predicts, by calls of latency mode."""

from __future__ import annotations

import train_moe_cli  # isort: skip  (first: it puts examples/ on the path)

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import typer
from flax import nnx

import decode_moe
import jax_ep
import machine
from byte_lm import cluster, data
from byte_lm.decoding import Decoder
from byte_lm.training import Trainer, TrainState
from common.checkpoints import Checkpoints
from conftest import PLATFORM
from spmd import make_mesh, native_calls, ranks_at_most, run_python

pytestmark = pytest.mark.one_process("decodes in one process")

RANKS = 2 * (ranks_at_most(4) // 2)
TRAIN = train_moe_cli.TINY_TRAIN
MODEL = dataclasses.replace(train_moe_cli.TINY_MODEL, num_layers=2, num_heads=2)
TEXTS, PROMPT, NEW = 4, 5, 6


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("a small text, again and again. " * 200)
    return path


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    make_mesh(RANKS)  # or the test is skipped
    return cluster.make_mesh(devices=RANKS, data_parallel=None)


class Trained(NamedTuple):
    """A model, and how it came about.

    Attributes:
        steps: State, number and total of each step of its training.
    """

    corpus: data.Corpus
    trainer: Trainer
    state: TrainState
    origin: str
    steps: list[tuple[TrainState, int, int]]


@pytest.fixture(scope="module")
def trained(text, mesh) -> Trained:
    """Its steps change nothing: those of ``test_example_train.py`` do, and take long to compile."""
    corpus = data.load(text, min_bytes=TRAIN.seq_len + 1)
    absent, steps = pathlib.Path("/no/such/run"), []

    def note(_: Trainer, state: TrainState, __: Any, *, step: int, total_steps: int) -> Any:
        steps.append((state, step, total_steps))
        return state, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step_on", note)
        found = decode_moe.load_or_train(
            mesh, absent, corpus, steps=3, model_config=MODEL, train_config=TRAIN
        )
    return Trained(corpus, *found, steps)


def make_decoder(mesh: jax.sharding.Mesh, **options: Any) -> Decoder:
    sizes = {"batch_size": TEXTS, "prompt_bytes": PROMPT, "new_bytes": NEW}
    return Decoder(mesh, MODEL, **sizes | options)


@pytest.fixture(scope="module")
def decoder(mesh) -> Decoder:
    return make_decoder(mesh)


def test_trains_where_there_is_no_checkpoint(trained):
    assert trained.origin == "trained for 3 steps only, as there is no checkpoint in /no/such/run"
    assert [numbers for _, *numbers in trained.steps] == [[1, 3], [2, 3], [3, 3]]


def test_each_byte_is_what_the_model_predicts(trained, decoder):
    """The model without a cache, on the whole text, has the same logits."""
    corpus, trainer, state, *_ = trained
    prompts = decode_moe.prompts_of(corpus, None, batch_size=TEXTS, length=PROMPT)
    assert len(np.unique(prompts, axis=0)) > 1
    begun = decoder.begin(state, decoder.put(prompts))
    made = decoder.texts(state, begun, seed=0, temperature=0.0)
    assert made.shape == (TEXTS, NEW)
    whole = np.concatenate([prompts, made], axis=1)
    model = nnx.merge(trainer._full_graph, state.params, state.buffers)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens)[0])(trainer.put(whole)))
    np.testing.assert_allclose(begun.logits, logits[:, PROMPT - 1], rtol=1e-4, atol=1e-5)
    before = logits[:, PROMPT - 1 : -1]
    chosen = np.take_along_axis(before, made[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, before.max(axis=-1), rtol=1e-4, atol=1e-5)


def test_texts_at_a_temperature(trained, decoder):
    corpus, _, state, *_ = trained
    prompts = decode_moe.prompts_of(corpus, b"again", batch_size=TEXTS, length=PROMPT)
    begun = decoder.begin(state, decoder.put(prompts))
    hot, again, other, cold, greedy = (
        decoder.texts(state, begun, seed=seed, temperature=temperature)
        for seed, temperature in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 1e-5), (0, 0.0))
    )
    np.testing.assert_array_equal(hot, again)
    assert (hot != other).any()
    assert len(np.unique(hot, axis=0)) > 1 and len(np.unique(greedy, axis=0)) == 1
    np.testing.assert_array_equal(cold, greedy)


@pytest.mark.parametrize(("latency", "mode"), [(True, "latency"), (False, "throughput")])
def test_the_mode_of_its_ops(trained, mesh, decoder, monkeypatch, latency, mode):
    """Seen in the calls that it would make on GPUs."""
    pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
    create_group = jax_ep.create_group

    def create(*args: Any, **kwargs: Any) -> jax_ep.Group:
        group = create_group(*args, backend="reference", **kwargs)
        return dataclasses.replace(group, backend="cuda")

    corpus, _, state, *_ = trained
    prompts = decode_moe.prompts_of(corpus, None, batch_size=TEXTS, length=PROMPT)
    begun = decoder.begin(state, decoder.put(prompts))
    monkeypatch.setattr(jax_ep, "create_group", create)
    decoder = make_decoder(mesh, latency=latency)
    scan = jax.make_jaxpr(decoder.decode)(state, begun, np.int32(0), np.float32(0))
    exchange = jax.make_jaxpr(decoder.exchange)(
        np.ones((TEXTS, MODEL.hidden), np.float32),
        np.zeros((MODEL.num_layers, TEXTS, MODEL.top_k), np.int32),
    )
    latency_ops = ["jax_ep_latency_dispatch", "jax_ep_latency_combine"]
    throughput_ops = ["jax_ep_plan_dispatch", "jax_ep_combine"]
    expected = latency_ops if mode == "latency" else throughput_ops
    for program in (scan, exchange):
        found = [call["target"] for call in native_calls(program.jaxpr)]
        assert found == expected * MODEL.num_layers


def test_texts_that_do_not_split():
    mesh = cluster.make_mesh(devices=2, data_parallel=1)
    with pytest.raises(
        ValueError, match="--batch-size: expected a positive multiple of 2, the dev"
    ):
        make_decoder(mesh, batch_size=3)


@pytest.mark.skipif(PLATFORM != "cpu", reason="the number of devices is set on CPU only")
def test_command_line(trained, mesh, text, tmp_path):
    """It loads the checkpoint of a run and prints texts, speed and the share of communication."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    settings = {"model": dataclasses.asdict(MODEL), "train": dataclasses.asdict(TRAIN)}
    checkpoints.save(1, trained.steps[0][0], settings)
    checkpoints.close()
    script = pathlib.Path(decode_moe.__file__)
    arguments = f"--run {tmp_path} --data {text} --devices 2 --batch-size 4 --new-bytes 3 --show 1"
    flags = machine.compiler_flags()
    done = run_python(
        "-W",
        "error",
        str(script),
        *f"{arguments} --prompt again --repeat 1".split(),
        timeout=300,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=flags,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"model: step 1 of {tmp_path}" in done.stdout
    for name in ("greedy", "temperature 0.8"):
        assert re.search(rf"─ {name}, text 0 ─+\nagain", done.stdout), name
    assert re.search(r"^\d+ tokens/s: a step of 4 tokens, 2 on each device", done.stdout, re.M)
    assert re.search(r"^communication: \d+ % of it, as .* take \d+ us alone", done.stdout, re.M)
    assert "calls of jax_ep: jax_ep_combine, jax_ep_dispatch, jax_ep_plan" in done.stdout


def test_an_empty_prompt(capsys):
    with pytest.raises(typer.Exit):
        decode_moe.main(prompt="")
    assert "decode_moe.py: --prompt: expected one byte or more" in capsys.readouterr().err
