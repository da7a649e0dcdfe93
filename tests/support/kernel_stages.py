"""The stages of ``gpu_suite.py`` that run the programs of ``tests/cuda``: kernels without XLA.

Each function gives the commands of a stage, with {binaries} to be filled in.
"""

from __future__ import annotations

import emulated_decode

# Programs of several ranks with few rows, because the tools slow them down by orders of magnitude.
_SANITIZED = [
    "kernels_test layout=expert ranks=2 plan=push",
    "kernels_test layout=token ranks=2 plan=pull",
    "kernels_test layout=expert ranks=2 fp8=1",
    "kernels_test layout=token ranks=2 cast=fp8 dense=1",
    "kernels_test layout=expert ranks=3 dtype=f32 plan=push",
    "kernels_test layout=expert ranks=2 at_once=1",
    "decode_test layout=expert ranks=2 weighted=1 alignment=1",
    "decode_test layout=token ranks=2 fp8=1",
    "decode_test layout=token ranks=2 order=flying",
    "kernels_test layout=token ranks=2 fp8=1 behind=1",
    "network_test layout=expert ranks=2 direct=1 chunk_kib=16",
    "network_test layout=token ranks=4 fp8=1 direct=1 chunk_kib=16",
]
_SMALL = "tokens=100 hidden=512 experts=12 topk=4 blocks=6 repeat=2 timeout=60"
# The workload of the decode benchmarks; the times are those of graphs of so many ops.
_DECODE = "tokens=128 alignment=1 blocks=50 steps=2 time=200"
_RACES = "tokens=2000 hidden=256 experts=12 topk=4 blocks=6"
# What a rank does in failures_test.
_FAILED = "tokens=1000 hidden=1024 experts=12 topk=4 blocks=6 ranks=3"
_FAILURES = [
    f"op={op} layout={layout} failure={failure}"
    for op, layout in (
        ("dispatch", "expert"),
        ("dispatch", "token"),
        ("combine", "token"),
        ("combine_vjp", "expert"),
    )
    for failure in (
        "absent",
        "gone",
        "gone phase=close",
        "mismatch",
        "stops",
        "unreachable",
        "misplaced",
        "misplaced coords=instance",
    )
] + [
    "op=combine layout=expert failure=absent",
    "op=combine layout=expert failure=mismatch other=dispatch",
    "op=combine layout=expert failure=unreachable",
    "op=combine layout=expert failure=misplaced",
    "op=combine layout=expert failure=gone phase=close items=60000",
    "op=combine layout=expert failure=gone phase=rows",
    "op=combine layout=expert failure=gone routes=first phase=rows tokens=8000 ranks=2",
    "op=dispatch layout=expert failure=concurrent other=combine",
    "op=combine layout=expert failure=concurrent other=dispatch other_tag=1 ranks=2",
    "op=combine layout=token failure=concurrent other=dispatch other_blocks=2",
    "op=combine_vjp layout=expert failure=concurrent other=combine",
    "op=combine layout=expert failure=stops items=60000",
    "op=combine layout=expert failure=stops items=2 phase=rows",
    "op=combine layout=expert failure=stops routes=first word=receipt tokens=8000 ranks=2",
    "op=dispatch layout=expert failure=withholds word=address",
    "op=dispatch layout=expert failure=absent ranks=2 behind=1",
    "op=dispatch layout=token failure=gone ranks=2 behind=1",
    "op=plan layout=expert failure=withholds word=total",
    "op=plan layout=token failure=withholds word=message plan=push",
]
# Two hosts in the shape of the benchmarks.
_TWO_HOSTS = (
    "ranks=2 tokens=4096 hidden=7168 topk=8 experts=256 alignment=128 lanes=64 chunk_kib=256"
)


def of_one_host(gpus: int) -> list[str]:
    """The throughput kernels, bit by bit against the CPU backend, their times and their failures."""
    return [
        "{binaries}/plan_test check=1 failures=1 time=1",
        *(
            f"{{binaries}}/kernels_test layout={layout} {rows} blocks={blocks}"
            f" tokens={4096 if gpus > 1 else 2048}"
            for layout, blocks in (("expert", 64), ("token", 24))
            for rows in ("fp8=0", "fp8=1", "cast=fp8 dense=1")
        ),
        # Not all blocks of both ranks fit at once, although all wait for the other rank.
        f"{{binaries}}/kernels_test layout=expert blocks=90 tokens=2048 plan=pull ranks={2 * gpus}",
        *(f"{{binaries}}/failures_test {_FAILED} {failure}" for failure in _FAILURES),
        *(
            f"{{binaries}}/races_test race={race} layout={layout} ranks=3 tries=50 {_RACES}"
            for race in ("close", "reuse", "wrap")
            for layout in ("expert", "token")
        ),
    ]


def between_hosts() -> list[str]:
    """Kernels between hosts that reach each other's memory: bit by bit, and their times."""
    return [
        *(
            f"{{binaries}}/network_test direct=1 layout={layout} ranks={ranks} hosts={hosts} {rows}"
            " tokens=700 hidden=1024 experts=48 topk=6 blocks=6 lanes=3 chunk_kib=16 steps=5"
            for layout in ("expert", "token")
            for ranks, hosts in ((2, 2), (4, 2), (4, 4))
            for rows in ("fp8=0", "fp8=1")
        ),
        *(
            f"{{binaries}}/network_test direct=1 time=40 layout={layout} blocks={blocks} {_TWO_HOSTS}"
            for layout in ("expert", "token")
            for blocks in (24, 48, 64)
        ),
    ]


def of_latency_mode() -> list[str]:
    """The kernels of latency mode, in the same way."""
    return [
        *(
            f"{{binaries}}/decode_test layout={layout} {rows} {_DECODE}"
            for layout in ("token", "expert")
            for rows in ("fp8=1", "fp8=0", "cast=fp8")
        ),
        *(f"{{binaries}}/decode_test {given}" for given in emulated_decode.STEPS),
        *(f"{{binaries}}/decode_failures_test {given}" for given in emulated_decode.FAILURES),
    ]


def sanitizers() -> list[str]:
    """Programs under the tools of compute-sanitizer."""
    return [
        f"compute-sanitizer --tool {tool} --error-exitcode 1 {{binaries}}/{program} {_SMALL}"
        for tool in ("memcheck", "racecheck", "synccheck")
        for program in _SANITIZED
    ]
