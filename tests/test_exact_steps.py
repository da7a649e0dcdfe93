"""Steps that check themselves (``support/exact_steps.py``) pass, and find every wrong value."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import exact_steps
import jax_ep
from spmd import create_group, make_mesh, need_part, ranks_at_most

RANKS = ranks_at_most(4)


def logical_group(**kwargs):
    """On two hosts."""
    mesh = make_mesh(RANKS)
    need_part(mesh)
    return create_group(mesh, backend="reference", ranks_per_host=RANKS // 2, **kwargs)


pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests the checks; tests/test_hosts_hazards.py uses them"
)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_all_routings(layout):
    sizes = exact_steps.Sizes(tokens=5, hidden=8, layout=layout)
    run = exact_steps.program([logical_group()], sizes, 2)
    for name in (*exact_steps.NAMES, None):
        assert exact_steps.explain(run(3, name)) == {}, name


def test_two_groups():
    groups = [logical_group(), logical_group(timeout=77)]
    assert groups[0].id != groups[1].id
    run = exact_steps.program(groups, exact_steps.Sizes(tokens=4, hidden=4), 2)
    assert exact_steps.explain(run(0)) == {}


def test_repeated_runs(monkeypatch):
    """They begin where the last one has ended, and the wrong entries of all steps are added up."""
    sizes = exact_steps.Sizes(tokens=5, hidden=4, layout="token")
    real = jax_ep.combine
    monkeypatch.setattr(jax_ep, "combine", lambda *args, **kw: real(*args, **kw).at[2, 3].add(1))
    wrong = exact_steps.repeated([logical_group()], sizes, 3)(1, 2)
    assert exact_steps.explain(wrong) == {"y": [6] * RANKS}


def plus_one(out, row, channel):
    return dataclasses.replace(out, tokens=out.tokens.at[row, channel].add(1))


@pytest.mark.parametrize(
    ("op", "change", "what"),
    [
        ("dispatch", lambda out: plus_one(out, 0, 1), {"rows", "y"}),
        ("dispatch", lambda out: plus_one(out, -1, 0), {"rows"}),
        ("combine", lambda y: y.at[2, 3].add(0.0625), {"y"}),
    ],
    ids=["a row", "an unused row", "a sum"],
)
def test_a_wrong_value_is_counted(op, change, what, monkeypatch):
    """In one entry on each rank that has rows."""
    real = getattr(jax_ep, op)
    monkeypatch.setattr(jax_ep, op, lambda *args, **kwargs: change(real(*args, **kwargs)))
    run = exact_steps.program([logical_group()], exact_steps.Sizes(tokens=5, hidden=4), 1)
    assert set(exact_steps.explain(run(1, "spread"))) == what


def test_routes_of_another_step_are_counted(monkeypatch):
    """As if the plan had read the choices of the step before."""
    real = jax_ep.dispatch

    def stale(x, idx, *args, **kwargs):
        other = jax.numpy.where(idx >= 0, (idx + 1) % kwargs["num_experts"], idx)
        return real(x, other, *args, **kwargs)

    monkeypatch.setattr(jax_ep, "dispatch", stale)
    run = exact_steps.program([logical_group()], exact_steps.Sizes(tokens=5, hidden=4), 1)
    assert "sources of rows" in exact_steps.explain(run(1, "spread"))


def test_routings_are_what_they_are_called():
    sizes = exact_steps.Sizes(tokens=9, hidden=4)
    for i in range(5):
        for number, name in enumerate(exact_steps.NAMES):
            idx = exact_steps.host_routes(sizes, i=i, number=number, ranks=4, hosts=2)
            assert idx.shape == (4, 9, 2) and idx.min() >= -1 and idx.max() < 16
            assert not ((idx[..., 0] == idx[..., 1]) & (idx[..., 0] >= 0)).any()
            senders = (idx >= 0).any(axis=(1, 2)).sum()
            receivers = {e // 4 for e in idx[idx >= 0].tolist()}
            if name == "one_host":
                assert len({r // 2 for r in receivers}) == 1 and (idx >= 0).all()
            if name == "one_rank":
                assert len(receivers) == 1 and (idx >= 0).all()
            if name in ("silent_rank", "one_speaks"):
                assert senders == {"silent_rank": 3, "one_speaks": 1}[name]
            if name == "one_token":
                assert ((idx >= 0).any(axis=-1).sum(axis=-1) == 1).all()
            if name == "nothing":
                assert senders == 0
    assert np.array_equal(
        exact_steps.host_routes(sizes, i=8, number=exact_steps.EACH_IN_TURN, ranks=4, hosts=2),
        exact_steps.host_routes(sizes, i=8, number=8 % len(exact_steps.NAMES), ranks=4, hosts=2),
    )
