"""A model of scale: what dispatch and combine take on 1 to 256 hosts, from rates of links and NICs.

``predict`` says for a workload, a machine and a number of hosts how long plan, dispatch, combine and the
communication of a layer take, how many bytes they move over NVLink, over the network and in memory, which
of these bounds them, and how much memory of a GPU they take. ``python -m jax_ep.scale`` prints the same
for several numbers of hosts. Its figures are predictions: several hosts are not served natively yet.

``workload`` says what a prediction is for and ``machine`` what it is made from: rates, and a few
constants with their sources. ``expectation`` knows how many ranks and hosts a token needs, ``model`` turns
both into bytes and times, and ``show`` into a table, JSON and a plot.
"""

from jax_ep.scale.machine import H200, Machine
from jax_ep.scale.model import LayerTimes, MemoryUse, OpCost, Prediction, predict
from jax_ep.scale.workload import Workload

__all__ = [
    "H200",
    "LayerTimes",
    "Machine",
    "MemoryUse",
    "OpCost",
    "Prediction",
    "Workload",
    "predict",
]
