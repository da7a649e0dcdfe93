"""How many blocks the grouped matmuls of a program run on, read from the kernels themselves.

The text may be that of a lowered program or of a compiled one.
"""

from __future__ import annotations

import re

from jax.interpreters import mlir


def blocks_of_kernels(text: str) -> list[int]:
    """The blocks of each kernel in the text of a module, in the order in which they stand there."""
    return [_blocks(_bytes(module)) for module in modules_of_kernels(text)]


def modules_of_kernels(text: str) -> list[str]:
    """The bytes of the kernels in a program, as they are written there."""
    return re.findall(r'\bmosaic_gpu_v2\b.* module = "([^"]*)"', text)


def _bytes(written: str) -> bytes:
    """What an attribute's text stands for: MLIR writes backslashes twice, and other bytes in hex."""
    text = written.encode().replace(rb"\\", rb"\5C")
    return re.sub(rb"\\([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text)


def _blocks(module: bytes) -> int:
    """The grid of the only launch in a module of Mosaic GPU."""
    from jax._src.lib import mosaic_gpu_dialect

    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    with context:
        context.allow_unregistered_dialects = True
        text = str(mlir.ir.Module.parse(module))
    # Its operands: what it waits for, the grid, the block, and the bytes of shared memory.
    (sizes,) = re.findall(r'gpu\.launch"\(%\w+, (%\w+), (%\w+), (%\w+), ', text)
    constants = dict(re.findall(r'(%\w+) = \S*constant"\(\) \{value = (\d+) : index\}', text))
    blocks, *others = (int(constants[name]) for name in sizes)
    assert others == [1, 1]
    return blocks
