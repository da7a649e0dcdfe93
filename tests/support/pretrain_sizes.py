"""A program that trains ``examples/pretrain`` on 8, 4 and 16 of 16 devices.

``python pretrain_sizes.py ROWS OUT`` leaves three runs of 20 steps in OUT: "whole" on 8 devices,
"same", which ends in the middle and goes on there, and "others", which goes on with 4 devices and then
with 16.
"""

from __future__ import annotations

import pathlib
import sys

# Of a model that compiles quickly, on packed rows of pretrain_texts.
CHANGES = (
    "model.vocab_size=304",
    "model.hidden=32",
    "model.num_layers=1",
    "model.num_dense_layers=0",
    "model.num_heads=2",
    "model.q_lora_rank=0",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=8",
    "model.dense_intermediate=32",
    "model.moe_intermediate=16",
    "model.num_experts=16",
    "model.top_k=2",
    "data.seq_len=16",
    "data.batch_size=16",
    "optimizer.total_steps=100000",
    "run.log_every=1",
    "run.save_every=100000",
    "run.eval_every=100000",
)


def main(rows: pathlib.Path, out: pathlib.Path) -> None:
    """Train."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    import jax_ep  # noqa: F401  # isort: skip  (first: it prepares XLA's CPU client)

    import jax

    from examples.pretrain import config, step
    from examples.pretrain.data import Rows
    from examples.pretrain.loop import Loop, Options

    setups = {}
    for ranks in (8, 4, 16):
        settings = config.load("tiny", [*CHANGES, f"parallel.expert={ranks}"])
        setups[ranks] = step.setup(settings, jax.devices()[:ranks])
    opened = Rows(rows, seq_len=16, vocab_size=304)
    for name, parts in (
        ("whole", [(8, 20)]),
        ("same", [(8, 10), (8, 20)]),
        ("others", [(8, 7), (4, 14), (16, 20)]),
    ):
        for ranks, until in parts:
            setup = setups[ranks]
            with Loop(setup.config, setup, opened, Options(out=out / name, resume=True)) as loop:
                loop._total_steps = until
                assert loop.train() == 0


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
