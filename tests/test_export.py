"""``jax.export`` as in docs/sharding.md: one process writes, another makes the group and runs it."""

from __future__ import annotations

import pytest

import spmd

pytestmark = pytest.mark.one_process("starts processes of its own")

PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
import jax_ep
from jax.sharding import NamedSharding, PartitionSpec as P

path = pathlib.Path(sys.argv[2])
mesh = jax.sharding.Mesh(jax.devices()[:2], ("expert",))
group = jax_ep.create_group(mesh, "expert")
x = jax.device_put(jnp.arange(64.0).reshape(4, 16), NamedSharding(mesh, P("expert")))


def body(x):
    idx = jnp.array([[0, 3]] * 2)
    out = jax_ep.dispatch(x, idx, group=group, num_experts=4)
    return jax_ep.combine(out.tokens, out.handle, group=group)


if sys.argv[1] == "write":
    names = ["jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_combine_vjp"]
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    double = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    path.write_bytes(jax.export.export(double, disabled_checks=checks)(x).serialize(vjp_order=1))
else:
    double = jax.jit(jax.export.deserialize(path.read_bytes()).call)
    assert (double(x) == 2 * x).all()
    assert (jax.jit(jax.grad(lambda x: double(x).sum()))(x) == 2).all()
"""


def test_export(tmp_path):
    pytest.importorskip("flatbuffers.compat", reason="jax.export writes with it")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for what in ("write", "run"):
        done = spmd.run_python(str(program), what, str(tmp_path / "exported"), timeout=120)
        assert done.returncode == 0, done.stderr
