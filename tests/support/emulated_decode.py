"""What ``test_emulated_kernels`` runs of latency mode: arguments of its two programs."""

from __future__ import annotations

_SMALL = "tokens=40 experts=12 topk=4 blocks=2 alignment=8 timeout=60"

# Shapes, ranks without tokens, skewed routes, rooms that drop rows, rows of every kind, epochs that
# wrap, several batches of tokens in a block, more words of ids than a thread reads at a time.
STEPS = [
    f"{_SMALL} {given}"
    for given in (
        "layout=expert ranks=2 hidden=2056 weighted=1",
        "layout=token ranks=2 hidden=264 more_blocks=1",
        "layout=expert ranks=2 hidden=264 capacity=400 keeps_unused=1",
        "layout=expert ranks=3 hidden=1032 masked=2 dtype=f16",
        "layout=token ranks=3 hidden=2048 capacity=50",
        "layout=expert ranks=3 hidden=136 capacity=48 weighted=1",
        "layout=expert ranks=2 tokens=13 topk=6 experts=80 hidden=136 capacity=40 alignment=1",
        "layout=expert ranks=2 hidden=136 routes=first",
        "layout=expert ranks=2 hidden=136 routes=few epoch=0xfffffffe steps=5",
        "layout=token ranks=2 hidden=136 epoch=0xffffffff steps=4",
        "layout=expert ranks=2 hidden=136 masked=1",
        "layout=token ranks=4 hidden=136 masked=1 weights=0",
        "layout=expert ranks=2 tokens=13 topk=6 hidden=1036 dtype=f32 expert_capacity=2",
        "layout=expert ranks=2 tokens=128 topk=8 experts=32 hidden=256 fp8=1 blocks=5",
        "layout=token ranks=3 tokens=33 topk=6 experts=33 hidden=1920 cast=ue8m0 dense=1",
        "layout=expert ranks=2 tokens=33 topk=6 experts=32 hidden=2304 cast=fp8",
        "layout=token ranks=2 tokens=13 topk=6 experts=32 hidden=2304 cast=fp8 dtype=f32 dense=1",
        "layout=expert ranks=4 tokens=1 topk=2 experts=8 hidden=136",
        "layout=token ranks=8 tokens=3 topk=4 experts=16 hidden=136",
        "layout=expert ranks=8 tokens=5 topk=8 experts=32 hidden=264 masked=3",
        "layout=expert ranks=1 tokens=20 hidden=136",
        "layout=token ranks=2 topk=32 experts=64 hidden=136",
        "layout=expert ranks=2 tokens=200 topk=12 experts=24 hidden=24",
        "layout=token ranks=3 tokens=300 experts=24 hidden=24 capacity=333 blocks=3",
        # Ranks that need nothing of their peers run ahead of them.
        "layout=expert ranks=2 hidden=264 steps=6 order=ops routes=first",
        # Ops in two calls, also with other numbers of blocks than ops in one call between them, and
        # two ops in flight.
        "layout=expert ranks=2 hidden=2056 weighted=1 calls=2",
        "layout=token ranks=3 hidden=264 calls=3 more_blocks=1",
        "layout=token ranks=2 tokens=33 topk=6 experts=32 hidden=2304 cast=fp8 dense=1 calls=2",
        "layout=expert ranks=2 hidden=264 steps=6 order=ops routes=first calls=2",
        "layout=expert ranks=3 hidden=136 steps=5 order=flying masked=3",
        "layout=token ranks=2 hidden=136 steps=5 order=flying epoch=0xfffffffe",
        # Masked plans: room for any routing, and for few rows of an expert.
        "layout=expert ranks=3 tokens=20 hidden=136 fixed_places=1 alignment=64 capacity=256"
        " expert_capacity=64 keeps_unused=1 weighted=1",
        "layout=expert ranks=2 hidden=256 fixed_places=1 alignment=8 capacity=48 expert_capacity=8"
        " routes=few cast=fp8 order=flying",
        # Packed scales, of one part and of several, whose words several warps write; rows and blocks
        # that are no multiples of four.
        "layout=expert ranks=2 tokens=33 topk=6 experts=32 hidden=2304 cast=ue8m0 packed=1",
        "layout=token ranks=3 tokens=13 topk=4 experts=12 hidden=7168 cast=ue8m0 packed=1 capacity=33",
        "layout=expert ranks=2 hidden=3712 fp8=1 packed=1 capacity=203 alignment=1 keeps_unused=1",
        "layout=expert ranks=2 hidden=1920 fixed_places=1 alignment=6 capacity=36 expert_capacity=6"
        " routes=few cast=ue8m0 packed=1 order=flying",
        # An absent rank whose memory nobody may touch. It runs its ops by itself, or none.
        "layout=expert ranks=3 hidden=264 absent=1",
        "layout=token ranks=3 hidden=264 absent=2 dead=1 calls=3",
        "layout=expert ranks=4 hidden=136 absent=0 dead=1 order=flying steps=4",
        "layout=token ranks=2 hidden=256 absent=1 dead=1 cast=fp8 dense=1 epoch=0xfffffffe",
    )
]

# Chains of ops whose kernels stamp their phases with the clock.
PHASES = [
    f"{_SMALL} phases=3 replays=1 steps=1 {given}"
    for given in ("layout=expert ranks=2 hidden=2056", "layout=token ranks=3 hidden=264")
]

_FEW = "hidden=264 experts=12 topk=4 blocks=2 alignment=8 tokens=20"
FAILURES = [
    f"{_FEW} {given}"
    for given in (
        "op=dispatch failure=absent layout=expert ranks=3",
        "op=dispatch failure=absent layout=token ranks=2 failing=0 fp8=1 hidden=256",
        "op=combine failure=absent layout=expert ranks=3",
        "op=dispatch failure=gone layout=token ranks=3",
        "op=combine failure=gone layout=expert ranks=2",
        "op=dispatch failure=stops layout=expert ranks=3",
        "op=dispatch failure=stops layout=token ranks=2 items=2 tokens=60 hidden=2056",
        # In the first of several batches of a block's tokens.
        "op=dispatch failure=stops layout=expert ranks=2 items=2 tokens=100 topk=32 experts=64"
        " hidden=2056",
        "op=combine failure=stops layout=token ranks=2",
        "op=combine failure=stops layout=expert ranks=3 items=1 tokens=60",
        "op=dispatch failure=withholds word=hello layout=expert ranks=2",
        "op=dispatch failure=withholds word=ids layout=expert ranks=3",
        "op=combine failure=withholds word=hello layout=token ranks=2",
        "op=dispatch failure=mismatch layout=expert ranks=3 failing=0",
        "op=dispatch failure=mismatch other=combine layout=expert ranks=3",
        "op=combine failure=mismatch other=dispatch layout=expert ranks=3",
        "op=combine failure=mismatch layout=token ranks=2",
        "op=dispatch failure=elsewhere layout=expert ranks=2",
        "op=combine failure=elsewhere layout=token ranks=3",
        "op=dispatch failure=misplaced layout=expert ranks=3",
        "op=combine failure=misplaced layout=token ranks=2",
        "op=dispatch failure=concurrent layout=expert ranks=2",
        "op=combine failure=concurrent layout=token ranks=3",
        "op=dispatch failure=absent layout=expert ranks=3 calls=2",
        "op=combine failure=gone layout=token ranks=2 calls=2",
        "op=dispatch failure=stops layout=token ranks=2 items=1 tokens=60 calls=2",
        "op=combine failure=stops layout=expert ranks=2 items=1 tokens=100 calls=2",
        "op=combine failure=mismatch layout=expert ranks=3 failing=0 calls=2",
        "op=dispatch failure=misplaced layout=expert ranks=3 calls=2",
        "op=dispatch failure=concurrent layout=expert ranks=2 calls=2",
        "op=dispatch failure=restarts layout=expert ranks=3 calls=2",
        "op=combine failure=done layout=token ranks=2 calls=2",
        "op=combine failure=crossed layout=expert ranks=3 calls=2",
        "op=dispatch failure=gone layout=expert ranks=2 hidden=640 fp8=1 packed=1",
        # A rank fails where another one is absent from the beginning.
        "op=dispatch failure=absent layout=expert ranks=4 absent=0",
        "op=combine failure=gone layout=token ranks=3 absent=1 calls=2",
    )
]

# What is taken out (test_hooks.cuh, emulator.h), and steps that must notice it.
_MANY = "timeout=1 blocks=2 alignment=8 ranks=2 tokens=40 topk=4 experts=12 steps=6"
MUTATIONS = [
    (16, f"{_MANY} layout=expert hidden=1032"),
    (16, f"{_MANY} layout=expert hidden=264 order=flying"),
    (17, f"{_MANY} layout=expert hidden=264 order=ops routes=first"),
    (17, f"{_MANY} layout=expert hidden=264 order=ops routes=first calls=2"),
    (18, f"{_MANY} layout=token hidden=1032"),
    (18, f"{_MANY} layout=expert hidden=264 order=flying"),
    (19, f"{_MANY} layout=expert hidden=1032"),
    (102, f"{_MANY} layout=expert hidden=1032"),
    (103, f"{_MANY} layout=token hidden=1032"),
]
