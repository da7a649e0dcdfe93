"""Data of ``examples/pretrain``: documents, tokenizer, packed rows, and batches by one position."""

from __future__ import annotations

import pretrain_texts  # isort: skip  (first: it puts the repository on the path)

import dataclasses
import gzip
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import typer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.pretrain import pack, tokenizer
from examples.pretrain.data import Feed, Rows, Source, held_out_batches
from examples.pretrain.documents import documents
from examples.pretrain.rows import Summary
from spmd import ranks_at_most

pytestmark = pytest.mark.one_process("reads files, and makes meshes of the devices of one process")

SEQ_LEN = 16
DEVICES = ranks_at_most(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return pretrain_texts.make_rows(tmp_path_factory.mktemp("data") / "rows", seq_len=SEQ_LEN)


@pytest.fixture
def rows(folder) -> Rows:
    return Rows(folder, seq_len=SEQ_LEN, vocab_size=pretrain_texts.VOCAB)


def split(*axes: str | None, shape: tuple[int, int] = (DEVICES, 1)) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(shape), ("data", "tensor"))
    return NamedSharding(mesh, P(*axes))


def take(feed: Feed, count: int) -> list[dict[str, np.ndarray]]:
    batches = [jax.device_get(batch) for batch in itertools.islice(feed, count)]
    feed.close()
    return batches


def test_documents_of_text_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("one")
    lines = [{"content": "two"}, {"content": ""}, {"content": "three"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "c.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "d.bin").write_bytes(b"\0\1")
    assert list(documents([tmp_path], field="content")) == ["two", "three", "one", "two", "three"]
    assert list(documents([tmp_path], pattern="*.txt")) == ["one"]
    with pytest.raises(
        ValueError, match=r"a.jsonl.gz, line 1: expected a JSON object with the fie"
    ):
        list(documents([tmp_path]))
    with pytest.raises(FileNotFoundError, match="expected a file or folder of text, got /no/such"):
        list(documents([pathlib.Path("/no/such")]))


def test_without_folders_documents_are_those_of_python():
    assert any("itertools" in text for text in itertools.islice(documents([]), 20))


def test_tokenizer_gives_text_back(tmp_path):
    trained = tokenizer.train(pretrain_texts.texts(50), vocab=pretrain_texts.VOCAB)
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    text = "experts, ranks — and Ünicode\n"
    assert loaded.decode(loaded.encode(text).ids) == text
    assert len(loaded.encode("expert scatter").ids) < len("expert scatter")
    assert loaded.id_to_token(tokenizer.end_token(loaded)) == tokenizer.END
    with pytest.raises(ValueError, match="--vocab: expected at least 257, got 100"):
        tokenizer.train([], vocab=100)


def test_rows_hold_every_token_once_as_a_target(folder, rows):
    """Pieces of a document share one token, so its targets are all its tokens but the first."""
    loaded = tokenizer.load(folder / "tokenizer.json")
    end = tokenizer.end_token(loaded)
    expected: dict[int, int] = {}
    for text in pretrain_texts.texts(200):
        for token in [*loaded.encode(text).ids, end][1:]:
            expected[token] = expected.get(token, 0) + 1
    found: dict[int, int] = {}
    num_rows = rows.summary.num_rows
    for part in ("train", "held_out"):
        targets = 0
        for number in range(num_rows[part]):
            row = rows._row(part, number)
            segments = row["segments"]
            is_target = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
            targets += is_target.sum()
            for token in row["tokens"][1:][is_target]:
                found[token] = found.get(token, 0) + 1
        assert targets == rows.summary.num_targets[part]
    assert found == expected
    assert rows.summary.num_targets["train"] > 0.85 * num_rows["train"] * SEQ_LEN
    assert rows.summary.num_files["train"] > 1


def test_equal_documents_are_on_the_same_side(tmp_path):
    loaded = tokenizer.train(pretrain_texts.texts(50), vocab=pretrain_texts.VOCAB)
    documents = [f"{text} {number % 7}" for number, text in enumerate(pretrain_texts.texts(70))]
    once = pack.pack(documents, loaded, tmp_path / "a", seq_len=16, held_out=0.3)
    twice = pack.pack([*documents, *documents], loaded, tmp_path / "b", seq_len=16, held_out=0.3)
    assert twice.num_targets == {part: 2 * count for part, count in once.num_targets.items()}
    assert once.digest != twice.digest
    again = pack.pack(documents, loaded, tmp_path / "c", seq_len=16, held_out=0.3)
    assert again == once


def test_a_folder_that_is_not_whole_is_none(tmp_path):
    loaded = tokenizer.train(pretrain_texts.texts(50), vocab=pretrain_texts.VOCAB)
    with pytest.raises(
        ValueError, match="--held-out: expected documents on both sides, got none in"
    ):
        pack.pack(["one document"], loaded, tmp_path / "rows", seq_len=16, held_out=0.5)
    assert not (tmp_path / "rows").exists()
    with pytest.raises(
        FileNotFoundError, match=r"which has no rows.json; python -m examples.pretr"
    ):
        Summary.read(tmp_path / "rows")
    pretrain_texts.make_rows(tmp_path / "rows")
    with pytest.raises(FileExistsError, match="--out: expected a folder that is not there yet"):
        pretrain_texts.make_rows(tmp_path / "rows")


def test_large_vocabularies_take_four_bytes(folder):
    summary = dataclasses.replace(Summary.read(folder), vocab_size=1 << 17, seq_len=3)
    tokens, segments = np.array([1, 2, 1 << 16, 4], "<u4"), np.array([1, 1, 2, 0], "<u2")
    row = summary.decode(tokens.tobytes() + segments.tobytes())
    assert row["tokens"].tolist() == tokens.tolist()
    assert row["segments"].tolist() == segments.tolist()


def test_an_epoch_has_every_row_once_and_the_next_another_order(rows):
    count = rows.summary.num_rows["train"]
    order = rows.order(0)
    epochs = [
        [order[epoch * count + n]["tokens"].tobytes() for n in range(count)] for epoch in (0, 1)
    ]
    stored = [rows._row("train", number)["tokens"].tobytes() for number in range(count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(stored)
    assert len({tuple(epochs[0]), tuple(epochs[1]), tuple(stored)}) == 3
    other = [rows.order(1)[n]["tokens"].tobytes() for n in range(count)]
    assert other != epochs[0]


def test_a_position_gives_the_same_batches_on_any_mesh(rows):
    batch = 2 * DEVICES
    first = take(Feed(rows, split("data"), batch_size=batch, seed=3), 5)
    feed = Feed(rows, split(None), batch_size=batch, seed=3, position=2 * batch)
    after = take(feed, 3)
    assert feed.position == 5 * batch
    for one, other in zip(first[2:], after, strict=True):
        for name in ("tokens", "segments"):
            np.testing.assert_array_equal(one[name], other[name])
    # Other batches from the same position have the same rows, in the same order.
    small = take(Feed(rows, split("data"), batch_size=DEVICES, seed=3, position=2 * batch), 6)
    np.testing.assert_array_equal(
        np.concatenate([batch["tokens"] for batch in small]),
        np.concatenate([batch["tokens"] for batch in after]),
    )


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("other") / "rows"
    return pretrain_texts.make_rows(folder, seq_len=SEQ_LEN, seed=7)


def mixture(*sources: tuple[pathlib.Path, float]) -> Rows:
    given = [Source(*source) for source in sources]
    return Rows(given, seq_len=SEQ_LEN, vocab_size=pretrain_texts.VOCAB)


def test_a_mixture_has_the_shares_of_its_weights(folder, other_folder, rows):
    """Each source goes on in its own order, epoch by epoch, and the pattern is an even one."""
    mixed = mixture((folder, 3.0), (other_folder, 1.0))
    order, own = mixed.order(3), rows.order(3)
    taken = [order[n]["tokens"].tobytes() for n in range(4 * rows.summary.num_rows["train"])]
    expected = [own[n]["tokens"].tobytes() for n in range(3 * rows.summary.num_rows["train"])]
    from_first = [n for n, row in enumerate(taken) if row in set(expected)]
    assert [taken[n] for n in from_first] == expected
    for start in range(0, len(taken) - 39, 40):
        assert sum(start <= n < start + 40 for n in from_first) == pytest.approx(30, abs=1)
    held_out = mixed.held_out(0, mixed.summary.num_rows["held_out"])
    assert all(row["segments"][0] == 1 for row in held_out) and len(held_out) > 3


def test_a_position_in_a_mixture_is_one_number(folder, other_folder):
    mixed = mixture((folder, 0.7), (other_folder, 0.3))
    batch = 2 * DEVICES
    first = take(Feed(mixed, split("data"), batch_size=batch, seed=3), 5)
    after = take(Feed(mixed, split(None), batch_size=batch, seed=3, position=2 * batch), 3)
    for one, other in zip(first[2:], after, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    # A run is bound to its sources and weights.
    digests = {
        mixture(*sources).summary.digest
        for sources in (
            ((folder, 0.7), (other_folder, 0.3)),
            ((folder, 0.3), (other_folder, 0.7)),
            ((other_folder, 0.7), (folder, 0.3)),
            ((folder, 1.0),),
        )
    }
    assert len(digests) == 4 and Summary.read(folder).digest in digests


def test_sources_of_a_mixture_have_one_tokenizer(folder, tmp_path):
    loaded = tokenizer.train(pretrain_texts.texts(9, seed=5), vocab=280)
    pack.pack(pretrain_texts.texts(60), loaded, tmp_path / "b", seq_len=SEQ_LEN, held_out=0.2)
    with pytest.raises(
        ValueError, match=r"--data: expected rows of one tokenizer, got .* with two"
    ):
        mixture((folder, 1.0), (tmp_path / "b", 1.0))


class _Half:
    """A sharding as one of two processes sees it, which has the devices of one part of the rows."""

    def __init__(self, sharding: NamedSharding, process: int) -> None:
        self._sharding, self._process = sharding, process

    def addressable_devices_indices_map(self, shape):
        places = list(self._sharding.addressable_devices_indices_map(shape).items())
        half = len(places) // 2
        return dict(places[half * self._process : half * (self._process + 1)])


@pytest.mark.parametrize("axes", [("data",), ("tensor",)], ids=["own rows", "the same rows"])
def test_each_process_reads_what_its_devices_hold(rows, axes):
    """Where two processes hold the same rows, both read them."""
    sharding = split(*axes, shape=(DEVICES // 2, 2))
    whole = take(Feed(rows, sharding, batch_size=DEVICES, seed=0), 1)[0]["tokens"]
    for process in (0, 1):
        feed = Feed(rows, _Half(sharding, process), batch_size=DEVICES, seed=0)
        local = next(feed._batches)["tokens"]
        feed.close()
        expected = whole
        if axes == ("data",):
            expected = np.split(whole, 2)[process]
        np.testing.assert_array_equal(local, expected)


def test_held_out_rows_come_once_and_the_last_batch_is_filled_up(rows):
    batches = list(held_out_batches(rows, split("data"), batch_size=DEVICES, num_batches=1000))
    count = rows.summary.num_rows["held_out"]
    assert len(batches) == -(-count // DEVICES)
    segments = np.concatenate([batch["segments"] for batch in batches])
    assert (segments[:count, 0] > 0).all() and (segments[count:] == 0).all()
    (first,) = held_out_batches(rows, split("data"), batch_size=DEVICES, num_batches=1)
    np.testing.assert_array_equal(first["tokens"], batches[0]["tokens"])


def test_rows_that_do_not_fit_the_configuration(folder):
    with pytest.raises(
        ValueError, match=r"expected rows for data.seq_len = 8, got .* with 16; pack"
    ):
        Rows(folder, seq_len=8, vocab_size=pretrain_texts.VOCAB)
    with pytest.raises(ValueError, match=r"a vocabulary of model.vocab_size = 10, got .* with 299"):
        Rows(folder, seq_len=SEQ_LEN, vocab_size=10)


def test_commands(tmp_path, capsys):
    """Both programs, one after the other, and a wrong option of each in one line."""

    def run(main, *options: object) -> int:
        app = typer.Typer()
        app.command()(main)
        with pytest.raises(SystemExit) as end:
            app([str(option) for option in options])
        return end.value.code

    (tmp_path / "texts").mkdir()
    for number, text in enumerate(pretrain_texts.texts(60)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    train = ("--train", tmp_path / "texts", "--out", tmp_path / "tok.json")
    assert run(tokenizer.main, *train, "--vocab", 280) == 0
    assert "280 tokens in" in capsys.readouterr().out
    assert run(tokenizer.main, *train, "--vocab", 9) == 2
    assert capsys.readouterr().err == "tokenizer: --vocab: expected at least 257, got 9.\n"
    packed = ("--data", tmp_path / "texts", "--out", tmp_path / "rows", "--seq-len", 8)
    assert run(pack.main, *packed, "--tokenizer", tmp_path / "none.json") == 2
    assert capsys.readouterr().err.startswith("pack: --tokenizer: expected a file, got ")
    options = ("--tokenizer", tmp_path / "tok.json", "--held-out", 0.2)
    assert run(pack.main, *packed, *options) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["train", "held_out"]
    assert Rows(tmp_path / "rows", seq_len=8, vocab_size=280).summary.num_rows["train"] > 10
