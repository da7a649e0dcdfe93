"""docs/performance.md, its picture and README's table: rendered from records, and current."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from performance_page import (
    ROOT,
    SCRIPT,
    data,
    headline,
    loads,
    page,
    record,
    rows,
    targets,
    with_peers,
)


def test_unknown_tables_and_records_say_so(tmp_path):
    with pytest.raises(ValueError, match="no table 'speed'"):
        page.render("<!-- table: speed -->", targets, [])
    (tmp_path / "a.json").write_text(json.dumps([{"op": "grouped_dot"}]))
    with pytest.raises(ValueError, match=r"a\.json: record: fields .*'pass'"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"op": "loads"}]))
    with pytest.raises(ValueError, match=r"a\.json: record: fields .*'mover'"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{**record(), "extra": 1}]))
    with pytest.raises(ValueError, match=r"a\.json: record: .*extra"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([record(), loads()]))
    assert page.load_results(tmp_path) == [record(), loads()]


def test_later_records_take_the_place_of_earlier_ones():
    first, other, later = record(), record(processes=2), record(median_us=7.0)
    failed = record(median_us=None, error="too noisy")
    found = data.newest([first, loads(), other, loads(), later])
    assert found == [loads(), other, loads(), later]
    assert data.newest([first, failed]) == [failed]  # what is true now
    assert data.newest([first, record(name="other")]) == [first, record(name="other")]


def test_readme_has_the_rows_that_are_marked():
    text = f"before\n{headline.START}\nold\n{headline.END}\nafter\n"
    made = headline.readme(text, targets, [record(processes=2)])
    assert made.startswith(f"before\n{headline.START}\n")
    assert made.endswith(f"{headline.END}\nafter\n")
    assert "old" not in made and "| 195.0 @24 |" in made
    table = [line for line in made.splitlines() if line.startswith("| ")][2:]
    assert len(table) == sum(figure.get("headline", False) for figure in targets["figures"]) == 6
    assert set(table) <= set(rows(targets, [record(processes=2)], "headline"))
    assert headline.readme(made, targets, [record(processes=2)]) == made
    for broken in ("", headline.START, f"{headline.END}{headline.START}", text + headline.END):
        with pytest.raises(ValueError, match=r"README\.md: expected '<!-- headline -->'"):
            headline.readme(broken, targets, [])


def test_picture_knows_what_it_shows(tmp_path):
    plot = page.plot
    targets = with_peers(("DeepEP V2", 64, 250.0), ("NCCL EP", 0, 4000.0))  # one is cut
    shown = headline.rows(targets, [record(processes=2)])
    picture = tmp_path / "picture.png"
    assert plot.stored_hash(picture) is None
    plot.draw(shown, "2 × H200", picture)
    now = plot.data_hash(shown, "2 × H200")
    assert plot.stored_hash(picture) == now
    assert plot.data_hash(headline.rows(targets, [record(processes=2)]), "2 × H200") == now
    other = headline.rows(targets, [record(processes=2, median_us=196.0)])
    others = headline.rows(with_peers(("DeepEP V2", 64, 251.0)), [record(processes=2)])
    hashes = [
        *(plot.data_hash(other, "2 × H200"), plot.data_hash(others, "2 × H200")),
        *(plot.data_hash(headline.rows(targets, []), "2 × H200"), plot.data_hash(shown, "H100")),
    ]
    assert len({now, *hashes}) == 5
    plot.draw(headline.rows(with_peers(), []), "nothing measured", picture)
    assert plot.stored_hash(picture) not in (None, now)
    picture.write_bytes(b"no picture")
    assert plot.stored_hash(picture) is None
    picture.write_bytes(plot._SIGNATURE + b"cut")
    assert plot.stored_hash(picture) is None


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The script, set to write to copies of its files."""
    for name in ("PAGE", "README", "PICTURE"):
        copy = tmp_path / getattr(page, name).name
        shutil.copy(getattr(page, name), copy)
        monkeypatch.setattr(page, name, copy)
    monkeypatch.setattr(page, "ROOT", tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["render_performance.py", *arguments])
        return page.main()

    return run


def test_check_finds_what_is_out_of_date(copies, capsys, monkeypatch):
    assert copies("--check") == 0
    results = page.load_results(page.RESULTS)
    changed = [
        {**r, "median_us": 1.0}
        if r["op"] == "dispatch" and data.good(r) and r["tokens"] == 128
        else r
        for r in results
    ]
    monkeypatch.setattr(page, "load_results", lambda _: changed)
    assert copies("--check") == 1
    printed = capsys.readouterr().out
    for name in ("performance.md", "README.md", "performance.png"):
        assert f"{name} is out of date: run python docs/render_performance.py" in printed
    assert copies() == 0
    assert copies("--check") == 0
    page.PICTURE.unlink()
    assert copies("--check") == 1
    assert capsys.readouterr().out.startswith("performance.png is out of date")


def test_without_matplotlib(copies, capsys, monkeypatch):
    """The script needs it only to draw."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert copies("--check") == 0
    assert copies() == 0
    assert copies("--redraw") == 1
    assert (
        "performance.png needs matplotlib: pip install 'jax-ep[bench]'" in capsys.readouterr().out
    )


def test_page_is_current():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
