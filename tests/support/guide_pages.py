"""The script that renders docs/guides/, and the programs that the guides show.

Importing this module puts docs/ and examples/ on the path, because what it imports lies there.
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "examples")]

import render_guides as pages  # noqa: E402, F401

import port_linen as linen  # noqa: E402, F401 (for tests)
import port_maxtext as maxtext  # noqa: E402, F401
import port_nnx as nnx_model  # noqa: E402, F401
import port_settings as settings  # noqa: E402, F401
