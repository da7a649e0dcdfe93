"""The code in README works as it is shown."""

from __future__ import annotations

import pathlib
import re

import pytest

pytestmark = pytest.mark.one_process("reads results of one process")

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.strip().endswith(", 128)")
