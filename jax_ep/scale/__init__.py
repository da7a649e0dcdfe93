"""A model of scale: times of dispatch and combine on 1 to 256 hosts, from rates of links and NICs.

``predict`` says how long plan, dispatch, combine and the communication of a layer take on a number of
hosts. It also says how many bytes they move over NVLink, over the network and in memory, which of these
bounds them, and how much memory of a GPU they need. ``python -m jax_ep.scale`` prints the same for
several numbers of hosts. All figures are predictions, because jax_ep does not serve several hosts
natively yet.

``workload`` describes the layer. ``machine`` holds rates and fixed costs with their sources.
``expectation`` counts the ranks and hosts that a token needs, ``model`` turns them into bytes and
times, and ``show`` makes a table, JSON and a plot of the result.
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
