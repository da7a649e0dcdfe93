"""Benchmarks of dispatch, combine and whole layers: ``python -m jax_ep.bench --help``.

The command line (``__main__``) turns flags or the names of suites (``suites``) into cases (``cases``)
that suit the machine (``machine``) and runs them in processes of their own (``launch``,
``worker``), because XLA divides a GPU's memory once in a process. There, ``ranks`` knows who takes
part, and ``session`` has what the cases share. Inputs come from ``problems``, right results from
``expected``, programs from ``ops``, ``half_ops``, ``peers``, ``layer`` and, of ops in flight,
``overlap_ops`` and ``latency_beside``. ``timing`` takes times by the devices' ``clock``, ``ceilings``
measures the machine's speed in the same run, and ``trace`` reads kernels from profiles. The results are
records (``records``), which ``table`` and ``plot`` show.
"""
