"""What ``test_emulated_kernels`` runs of groups that span hosts: arguments of its programs."""

from __future__ import annotations

# Groups that span hosts: shapes, ranks that send nothing, lanes, rows that just fit a chunk.
STEPS = [
    "layout=token",
    "layout=expert weighted=1",
    "layout=expert dtype=f32 hidden=2052 chunk_kib=16",
    "layout=token fp8=1 hidden=384 hosts=3 ranks=3 blocks=5",
    "layout=expert fp8=1 hidden=128 hosts=4 ranks=4 masked=1 blocks=3",
    "layout=expert weighted=1 hosts=2 ranks=8 masked=2 experts=32 tokens=37",
    "layout=expert dtype=f16 hosts=4 ranks=8 experts=32 tokens=21 hidden=1032 chunk_kib=8",
    "layout=token hosts=8 ranks=8 tokens=9 experts=16 blocks=1",
    "layout=token hosts=3 ranks=6 blocks=4 lanes=1 tokens=101 hidden=16",
    "layout=expert hosts=3 ranks=6 capacity=64 tokens=60 blocks=3",
    "layout=expert hosts=2 ranks=2 tokens=0",
    # Sums of many rows, and of many ranks of a host.
    "layout=expert weighted=1 hosts=2 ranks=2 topk=32 experts=64 tokens=9 hidden=1032 chunk_kib=8",
    "layout=expert hosts=2 ranks=8 topk=16 experts=32 tokens=13 hidden=40",
    "layout=expert hosts=2 ranks=4 tokens=20 capacity=240 keeps_unused=1",
    "layout=expert hosts=2 ranks=4 tokens=1 blocks=3 capacity=8",
    # Windows with fewer rows than there is room for, so that lanes have equal shares; many of them.
    "layout=expert dtype=f32 hosts=2 ranks=4 tokens=22 hidden=8192 chunk_kib=256 blocks=6 lanes=3",
    "layout=expert hosts=2 ranks=4 tokens=300 experts=16 topk=4 hidden=8 chunk_kib=1 blocks=8 lanes=8",
    # Some or all hosts reach each other's memory.
    "layout=token direct=1 fp8=1 hidden=384",
    "layout=expert hosts=4 ranks=8 experts=32 tokens=21 direct=2 weighted=1",
]
PLANS = [
    "layout=expert",
    "layout=token",
    "layout=expert hosts=3 ranks=6 capacity=64 tokens=101",
    "layout=expert hosts=2 ranks=4 experts=160 topk=8 tokens=50 capacity=72",
    "layout=token hosts=2 ranks=2 capacity=30 blocks=1",
    "layout=expert hosts=4 ranks=8 experts=32 topk=8 tokens=33 masked=1 expert_capacity=7",
    "layout=token masked=2 tokens=1",
    "layout=expert tokens=0",
    "layout=expert direct=1",
    "layout=token hosts=4 ranks=8 experts=32 direct=2",
]
# A rank that never comes or stops, in a group of three hosts; a host at another op.
FAILURES = [
    "op=dispatch failure=absent layout=expert",
    "op=combine failure=absent layout=token failing=0",
    "op=combine_vjp failure=absent layout=expert",
    "op=dispatch failure=stops layout=token items=1",
    "op=combine failure=stops layout=expert items=1",
    "op=dispatch failure=stops layout=expert items=1 direct=1",
    "op=combine_vjp failure=stops layout=expert items=1",
    "op=dispatch failure=mismatch layout=expert other=combine",
    "op=combine failure=mismatch layout=token other=dispatch",
    "op=combine_vjp failure=mismatch layout=expert other=combine",
]
# Waits for credits, chunks, receipts, parts and rows that come home, and signals without an order
# (test_hooks.cuh); a network that sets signals before the bytes are there (emulator/network.h).
MUTATIONS = (8, 9, 10, 11, 12, 13, 14, 15, 20, 104)
