"""Benchmarks of dispatch, combine and whole layers: ``python -m jax_ep.bench --help``.

The command line (``__main__``) turns flags or the names of suites (``suites``) into cases (``cases``)
that suit the machine (``machine``) and has them run by processes of their own (``launch``,
``worker``): XLA divides a GPU's memory once a process. There, ``ranks`` knows who takes part and
``session`` what cases share; inputs come from ``problems``, what is right from ``expected``, programs
from ``ops``, ``peers`` and ``layer``, times from ``timing`` by the devices' ``clock``, and the
machine's speed in the same run from ``ceilings``. What comes out are records (``records``), which
``table`` and ``plot`` show.
"""
