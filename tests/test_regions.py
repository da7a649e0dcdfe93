"""How calls on GPUs are lowered: which run beside others, in which order, with how many SMs.

The programs are lowered for GPUs on any machine, and their text is read. ``test_schedules.py`` compiles
such programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import jax_ep
from jax_ep._backends import region
from jax_ep._groups import gpu_side
from jax_ep._groups.topology import Topology
from jax_ep._groups.tuning import Key
from jax_ep._moe import exchange
from jax_ep._ops import flights, overlap
from spmd import make_mesh, shard

pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
pytestmark = pytest.mark.one_process("lowers programs, and runs none")

TOKENS, HIDDEN, EXPERTS = 4, 128, 4
ONE_HOST = Topology(hosts=((0, 1),), processes=((0, 0),))
SMS = 100  # all but 32 of an H200
LATENCY = {"latency_tokens": TOKENS, "latency_hidden": 2 * HIDDEN}


def make_group(number: int = 1, **fields):
    """A group of GPUs, as far as tracing goes."""
    gpu_side._blocks_of_groups[number] = SMS
    names = {"axis_names": ("expert",), "backend": "cuda", "timeout": 1.0, "tuning": {}}
    return jax_ep.Group(mesh=make_mesh(2), id=number, **({"topology": ONE_HOST} | names | fields))


@dataclasses.dataclass(frozen=True)
class Call:
    """A native call in lowered text.

    Attributes:
        target: The target.
        stream: The stream that it runs on; "" in line with the program.
        channel: The attribute.
        num_sms: The attribute.
        group_id: The attribute.
        result: The name of its results.
        after: What it is given last, the order operand: a result of another call, or a constant.
    """

    target: str
    stream: str
    channel: int
    num_sms: int
    group_id: int
    result: str
    after: str


def calls_of(function, *, grad: bool = False) -> list[Call]:
    """The calls of ``function(x, topk_idx)`` on each rank, in program order."""
    mapped = shard(function, make_mesh(2), check_vma=False)
    if grad:
        whole = mapped
        mapped = jax.grad(lambda x, idx: jnp.sin(whole(x, idx)).sum())
    given = (
        jax.ShapeDtypeStruct((2 * TOKENS, HIDDEN), jnp.float32),
        jax.ShapeDtypeStruct((2 * TOKENS, 2), jnp.int32),
    )
    text = jax.jit(mapped).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    regions = dict(
        re.findall(r"func\.func private @(jax_ep_\w+)\([^\n]*\{\n(.*?)\n  \}", text, re.S)
    )
    found = []
    for line in text.splitlines():
        match = re.search(r"(%\w+)(?::\d+)? = [\w.]*call @(jax_ep_\w+)\(([^)]*)\)", line)
        if match is None or ("custom_call @" in line and "_async(" in line):  # in a region
            continue
        result, name, operands = match.groups()
        stream = re.search(r'_xla_stream_annotation = "(\w+)"', line)
        inside = regions[name] if stream else line
        (target,) = re.findall(r"custom_call @(jax_ep_\w+)\(", inside)
        numbers = [
            int(re.search(rf"{n} = (\d+)", inside)[1]) for n in ("channel", "num_sms", "group_id")
        ]
        found.append(
            Call(target, stream[1] if stream else "", *numbers, result, operands.split(", ")[-1])
        )
    return found


def dispatch_pair(group, x, idx, **kwargs):
    return jax_ep.dispatch_start(x, idx, group=group, num_experts=EXPERTS, **kwargs)


def test_plain_ops_run_in_line():
    group = make_group()

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
        return jax_ep.combine(out.tokens, out.handle, group=group)

    dispatch, combine = calls_of(run)
    assert [dispatch.target, combine.target] == ["jax_ep_plan_dispatch", "jax_ep_combine"]
    for call in dispatch, combine:
        assert call.channel == 0 and call.stream == ""
    assert combine.after.startswith(f"{dispatch.result}#")


def test_ops_in_flight_run_beside_the_program():
    """Forward and backward; the plan stays in line."""
    group = make_group()

    def run(x, idx):
        out = jax_ep.dispatch_done(dispatch_pair(group, x, idx))
        return jax_ep.combine_done(
            jax_ep.combine_start(jnp.sin(out.tokens), out.handle, group=group)
        )

    plan, *others = calls_of(run, grad=True)
    assert (plan.target, plan.channel, plan.stream) == ("jax_ep_plan", 0, "")
    assert [call.target for call in others] == [
        "jax_ep_dispatch_async",
        "jax_ep_combine_async",
        "jax_ep_dispatch_async",
        "jax_ep_combine_async",
    ]
    assert {(call.channel, call.stream) for call in others} == {(1, "collective")}


def test_gradient_of_weighted_combine_in_flight():
    group = make_group()

    def run(x, idx):
        out = jax_ep.dispatch_done(dispatch_pair(group, x, idx, topk_weights=idx * 0.5))
        ticket = jax_ep.combine_start(
            jnp.sin(out.tokens), out.handle, group=group, weights=out.weights
        )
        return jax_ep.combine_done(ticket)

    targets = [call.target for call in calls_of(run, grad=True)]
    assert "jax_ep_combine_vjp_async" in targets and "jax_ep_combine_vjp" not in targets


def test_two_ops_in_flight_share_the_sms():
    """The first has what it wants, the second what is left; ops in line beside them too."""
    group, config = make_group(channels=2), jax_ep.DispatchConfig(num_sms=70)

    def run(x, idx):
        first = dispatch_pair(group, x, idx, config=config)
        second = dispatch_pair(group, x + 1, idx, config=config)
        beside = jax_ep.dispatch(x + 2, idx, group=group, num_experts=EXPERTS, config=config)
        one, two = jax_ep.dispatch_done(first), jax_ep.dispatch_done(second)
        alone = dispatch_pair(group, x + 3, idx, config=config)
        three = jax_ep.dispatch_done(alone)
        return one.tokens + two.tokens + three.tokens + beside.tokens

    rows = [call for call in calls_of(run) if "dispatch" in call.target]
    assert [(call.channel, call.stream, call.num_sms) for call in rows] == [
        (1, "collective", 70),
        (2, "1", 30),
        (0, "", 2),
        (1, "collective", 70),
    ]


def test_after_shares_a_channel():
    """An op after another needs no SMs beside it, and comes behind it in XLA's order."""
    group, config = make_group(), jax_ep.DispatchConfig(num_sms=70)

    def run(x, idx):
        first = dispatch_pair(group, x, idx, config=config)
        second = dispatch_pair(group, x + 1, idx, config=config, after=first)
        third = dispatch_pair(group, x + 2, idx, config=config, after=second)
        outs = [jax_ep.dispatch_done(ticket) for ticket in (third, second, first)]
        return sum(out.tokens for out in outs)

    rows = [call for call in calls_of(run) if "dispatch" in call.target]
    assert [(call.channel, call.num_sms) for call in rows] == [(1, 70)] * 3
    assert [call.after for call in rows[1:]] == [call.result for call in rows[:-1]]


def test_tickets_say_which_sms_are_free():
    """All of an H200's that ops in flight leave, on whatever channels; a shared GPU is divided."""
    group, config = make_group(channels=2), jax_ep.DispatchConfig(num_sms=70)
    shared = make_group(2, topology=dataclasses.replace(ONE_HOST, gpus=(("one", "one"),)))
    gpu_side._blocks_of_groups[2] = SMS // 2
    key = Key(jax.devices()[0].device_kind, 2, "combine", "expert", "float32", HIDDEN, TOKENS)
    tuned = make_group(3, tuning={key: 90})
    free = []

    def run(x, idx):
        first = dispatch_pair(group, x, idx, config=config)
        beside = dispatch_pair(group, x + 1, idx, config=config)
        behind = dispatch_pair(group, x + 2, idx, after=first)
        tickets = [first, beside, behind]
        outs = [jax_ep.dispatch_done(ticket) for ticket in tickets]
        for options in {"group": shared}, {"group": tuned}, {"group": group, "layout": "token"}:
            ticket = dispatch_pair(options.pop("group"), x, idx, **options)
            tickets.append(ticket)
            outs.append(jax_ep.dispatch_done(ticket))
        free.extend(ticket.free_sms for ticket in tickets)
        return sum(out.tokens.sum() for out in outs) + x

    calls_of(run)
    # The op behind the first one has 64 SMs by default. Half of a GPU has 66, and room for 50 of them.
    # A dispatch's gradient is a combine, which has 90 in one group.
    assert free == [132 - 70, 132 - 70 - 30, 132 - 64 - 30, 66 - 50, 132 - 90, 132 - 24]


@pytest.mark.parametrize("num_chunks", [2, 3])
@pytest.mark.parametrize("num_sms", [None, 12])
def test_chunks_leave_sms_to_experts(num_chunks, num_sms):
    """Ops beside experts take few SMs, the others all of theirs; experts hear what is left."""
    group, told = make_group(), []
    config = None if num_sms is None else jax_ep.DispatchConfig(num_sms=num_sms)
    few, all_sms = num_sms or 24, num_sms or 64

    def experts(out, beside):
        told.append(beside)
        return out.tokens * 2

    def run(x, idx):
        options = {"group": group, "num_experts": EXPERTS, "config": config}
        weights = jnp.ones(idx.shape)
        flying = {"in_flight": True, "num_chunks": num_chunks}
        return exchange.exchange(x, idx, weights, experts, **flying, **options).y

    rows = [call for call in calls_of(run) if "_async" in call.target]
    assert [call.num_sms for call in rows] == [all_sms, *[few] * (2 * num_chunks - 2), all_sms]
    assert [beside.num_ops for beside in told] == [1, *[2] * (num_chunks - 2), 1]
    assert {beside.free_sms for beside in told} == {132 - few}


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize("start", [False, True])
def test_groups_keep_the_order_of_the_program(order, start):
    """Independent ops of two groups: no scheduler may swap them, in any process."""
    groups = {number: make_group(number) for number in order}

    def run(x, idx):
        total = 0
        handles = [
            jax_ep.dispatch(x, idx, group=groups[n], num_experts=EXPERTS).handle for n in order
        ]
        for n, handle in zip(order, handles, strict=True):
            if start:
                ticket = jax_ep.dispatch_start(x + n, handle=handle, group=groups[n])
                total += jax_ep.dispatch_done(ticket).tokens
            else:
                total += jax_ep.dispatch(x + n, handle=handle, group=groups[n]).tokens
        return total

    calls = calls_of(run)
    for channel in {call.channel for call in calls}:
        chain = [call for call in calls if call.channel == channel]
        assert not re.match(r"%\d", chain[0].after)  # a constant
        for before, call in itertools.pairwise(chain):
            assert call.after.partition("#")[0] == before.result
    rows = [call for call in calls if "dispatch" in call.target][-2:]
    assert [call.group_id for call in rows] == list(order)


def test_latency_mode_is_in_line_and_in_order():
    """Ops in flight have two calls, on a channel of their own, and no call passes another."""
    group, latency = make_group(**LATENCY), jax_ep.DispatchConfig(mode="latency")

    def run(x, idx):
        ticket = dispatch_pair(group, x, idx, config=latency)
        again = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, config=latency)
        out = jax_ep.dispatch_done(ticket)
        rows = out.tokens + again.tokens
        ticket = jax_ep.combine_start(rows, out.handle, group=group, config=latency)
        return jax_ep.combine_done(ticket)

    calls = calls_of(run, grad=True)
    assert [(call.target.removeprefix("jax_ep_"), call.channel) for call in calls] == [
        ("latency_dispatch_start", 1),
        ("latency_dispatch", 0),
        ("latency_dispatch_done", 1),
        ("latency_combine_start", 1),
        ("latency_combine_done", 1),
        ("dispatch", 0),
        ("combine", 0),
        ("combine", 0),
    ]
    assert {call.stream for call in calls} == {""}
    for pass_ in calls[:5], calls[5:]:  # forward and backward are lowered into blocks of their own
        for before, call in itertools.pairwise(pass_):
            assert call.after.startswith(f"{before.result}#")


def test_each_op_in_flight_in_latency_mode_holds_a_channel():
    """Also one that comes after another; and none of them holds SMs."""
    group, latency = make_group(channels=2, **LATENCY), jax_ep.DispatchConfig(mode="latency")
    free = []

    def run(x, idx):
        first = dispatch_pair(group, x, idx, config=latency)
        second = dispatch_pair(group, x + 1, idx, config=latency, after=first)
        with pytest.raises(ValueError, match=r"create_group\(channels=2\), all held .*; 3 ops"):
            dispatch_pair(group, x, idx, config=latency, after=second)
        one = jax_ep.dispatch_done(first)
        third = dispatch_pair(group, x + 2, idx, config=latency, after=second)
        free.extend(ticket.free_sms for ticket in (first, second, third))
        two, three = jax_ep.dispatch_done(second), jax_ep.dispatch_done(third)
        beside = dispatch_pair(group, x + 3, idx, config=jax_ep.DispatchConfig(num_sms=90))
        four = jax_ep.dispatch_done(beside)
        free.append(beside.free_sms)
        return one.tokens + two.tokens + three.tokens + four.tokens

    calls = [call for call in calls_of(run) if "latency" in call.target]
    assert [(call.target[-5:], call.channel) for call in calls] == [
        ("start", 1),
        ("start", 2),
        ("_done", 1),
        ("start", 1),
        ("_done", 2),
        ("_done", 1),
    ]
    assert free == [None, None, None, 132 - 90]


@pytest.mark.parametrize("sms", [80, 97])
def test_latency_mode_beside_an_op_in_flight(sms):
    """It takes what that leaves, if that is less than it has use for."""
    group, latency = make_group(**LATENCY), jax_ep.DispatchConfig(mode="latency")

    def run(x, idx):
        flying = dispatch_pair(group, x, idx, config=jax_ep.DispatchConfig(num_sms=sms))
        out = jax_ep.dispatch(x + 1, idx, group=group, num_experts=EXPERTS, config=latency)
        y = jax_ep.combine(out.tokens, out.handle, group=group, config=latency)
        return y + jax_ep.dispatch_done(flying).tokens[:TOKENS]

    calls = {call.target: call for call in calls_of(run)}
    for op in "dispatch", "combine":
        assert calls[f"jax_ep_latency_{op}"].num_sms == (3 if sms == 97 else 0)


def test_latency_mode_after_an_op_in_flight():
    """What it comes after is on another channel, so its operands wait for that."""
    group, idx = make_group(channels=2, **LATENCY), jnp.zeros((TOKENS, 2), jnp.int32)
    _, opened = flights.take_off("dispatch_start", group, 24)
    ticket = jax_ep.Ticket(jnp.ones((2, 2)), op="dispatch", opened=opened)
    for latency in False, True:
        begin = overlap._Start("dispatch_start", group, ticket)
        begin.issue(24, latency)
        assert (begin.order(idx) is idx) == (not latency)


def test_calls_in_a_loop_have_an_order_of_their_own():
    group = make_group()

    def run(x, idx):
        handle = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS).handle

        def body(x, _):
            rows = jax_ep.dispatch(x, handle=handle, group=group).tokens
            return jax_ep.combine(rows, handle, group=group), None

        return jax.lax.scan(body, x, length=3)[0]

    calls = calls_of(run)
    assert [call.target for call in calls] == [
        "jax_ep_plan_dispatch",
        "jax_ep_dispatch",
        "jax_ep_combine",
    ]
    in_loop = calls[-2:]
    assert not re.match(r"%\d", in_loop[0].after)
    assert in_loop[1].after.startswith(f"{in_loop[0].result}#")


WHY = {
    "across hosts": (
        {"topology": Topology(hosts=((0,), (1,)), processes=((0, 1),))},
        "the group spans hosts",
    ),
    "staged": ({}, "operands are copied before peers read them, because it grows"),
}


@pytest.mark.parametrize("name", WHY)
def test_starts_that_do_all_the_work_say_so(name, monkeypatch, caplog):
    fields, why = WHY[name]
    monkeypatch.setattr(gpu_side, "_staged_groups", {1: "it grows"} if name == "staged" else {})
    flights._warn_of_start.cache_clear()
    flight, opened = flights.take_off("dispatch_start", make_group(**fields), 24)
    assert flight.channel == 0 and opened.channel == 1
    assert f"start halves do all the work, and nothing overlaps: {why}" in caplog.text


def test_streams_of_channels():
    assert [region.stream_of(channel) for channel in (1, 2, 3)] == ["collective", "1", "2"]
