"""What the operations must compute, in NumPy and plain loops; all backends are compared with it.

Nothing here shares code with the package. Arrays are stacked over the ranks of one group: axis 0 is
the rank (R ranks; T tokens, H hidden, K top-k, E experts, L = E / R, C capacity). Results are exact
to the bit, except NaN payloads. They are not promised for f32 arithmetic that would give subnormal
numbers, because XLA flushes these on some platforms.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

BLOCK = 128
INT32_MAX = 2**31 - 1
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is no less than ``value``."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rows of one rank (``capacity``) and of one expert (``per_expert``)."""

    capacity: int
    per_expert: int


def limits(
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    layout: str,
    alignment: int,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    rank_capacity_factor: float | None = None,
) -> Limits:
    """The capacity that the arguments of ``dispatch`` stand for."""
    if layout == "token":
        return Limits(num_ranks * num_tokens if capacity is None else capacity, INT32_MAX)
    local_experts = num_experts // num_ranks
    rows = num_ranks * num_tokens * min(top_k, local_experts)
    padding = min(local_experts, rows) * (alignment - 1)
    lossless = round_up(rows + padding, alignment)
    bounds, per_expert = [lossless], INT32_MAX
    if capacity_factor is not None:
        pairs = num_ranks * num_tokens * top_k
        per_expert = math.ceil(capacity_factor * pairs / num_experts)
        bounds.append(local_experts * round_up(per_expert, alignment))
    if rank_capacity_factor is not None:
        rows = math.ceil(rank_capacity_factor * num_tokens * top_k)
        bounds.append(round_up(rows, alignment))
    return Limits(min(bounds) if capacity is None else capacity, per_expert)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The fields of a handle, stacked over ranks, and the static ones."""

    topk_idx: np.ndarray
    dest_row: np.ndarray
    recv_rows: np.ndarray
    recv_src: np.ndarray
    expert_idx: np.ndarray
    group_sizes: np.ndarray
    counts: np.ndarray
    demand: np.ndarray
    num_dropped: np.ndarray
    num_invalid: np.ndarray
    num_experts: int
    layout: str
    capacity: int

    def rank_of(self, expert: int) -> int:
        return expert // (self.num_experts // len(self.topk_idx))

    def source(self, rank: int, row: int) -> tuple[int, int, int] | None:
        """(source rank, token, k) of a row; k is 0 in layout "token"; None for an unused row."""
        _, num_tokens, top_k = self.topk_idx.shape
        code = int(self.recv_src[rank, row])
        if code < 0:
            return None
        if self.layout == "token":
            return code // num_tokens, code % num_tokens, 0
        return code // top_k // num_tokens, code // top_k % num_tokens, code % top_k

    def arrays(self, ranks_per_host: int | None = None) -> dict[str, np.ndarray]:
        """What handles hold, by name. Those of groups that span hosts list their rows by entries."""
        names = [field.name for field in dataclasses.fields(self)][:10]
        if self.layout == "expert":
            names.remove("expert_idx")
        found = {name: getattr(self, name) for name in names}
        if (ranks_per_host or len(self.topk_idx)) < len(self.topk_idx):
            del found["dest_row"], found["recv_rows"]
            found |= self._entries()
        return found

    def _entries(self) -> dict[str, np.ndarray]:
        """Start of each source rank's entries ``[R, R + 1]``; token and row of each ``[R, C]``."""
        num_ranks, num_tokens, _ = self.topk_idx.shape
        start = np.zeros((num_ranks, num_ranks + 1), np.int32)
        token, row = np.full((2, num_ranks, self.capacity), -1, np.int32)
        for rank in range(num_ranks):
            count = 0
            for source, rows in enumerate(self.recv_rows[rank]):
                for kept in rows[rows >= 0]:
                    token[rank, count], row[rank, count] = source % num_tokens, kept
                    count += 1
                start[rank, source // num_tokens + 1] = count
        return {"recv_start": start, "recv_token": token, "recv_row": row}


def sanitise(topk_idx: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """``topk_idx`` with its invalid entries as −1, and how many there were on each rank."""
    clean = np.full(topk_idx.shape, -1, np.int32)
    invalid = np.zeros((len(topk_idx), 1), np.int32)
    for rank, tokens in enumerate(topk_idx):
        for token, entries in enumerate(tokens):
            for k, entry in enumerate(map(int, entries)):
                if entry == -1:
                    continue
                if not 0 <= entry < num_experts or entry in clean[rank, token, :k]:
                    invalid[rank, 0] += 1
                else:
                    clean[rank, token, k] = entry
    return clean, invalid


def plan(
    topk_idx: np.ndarray, *, num_experts: int, layout: str, alignment: int, bounds: Limits
) -> Plan:
    """The routing plan of ``topk_idx`` ``[R, T, K]``."""
    num_ranks, num_tokens, top_k = topk_idx.shape
    local_experts = num_experts // num_ranks
    capacity = bounds.capacity
    clean, invalid = sanitise(topk_idx, num_experts)
    width = min(top_k, local_experts) if layout == "expert" else 1
    out = Plan(
        topk_idx=clean,
        dest_row=np.full(clean.shape, -1, np.int32),
        recv_rows=np.full((num_ranks, num_ranks * num_tokens, width), -1, np.int32),
        recv_src=np.full((num_ranks, capacity), -1, np.int32),
        expert_idx=np.full((num_ranks, capacity if layout == "token" else 0, top_k), -1, np.int32),
        group_sizes=np.zeros((num_ranks, local_experts), np.int32),
        counts=np.zeros((num_ranks, local_experts), np.int32),
        demand=np.zeros((num_ranks, local_experts), np.int32),
        num_dropped=np.zeros((num_ranks, 1), np.int32),
        num_invalid=invalid,
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
    )
    for rank in range(num_ranks):
        if layout == "expert":
            _plan_experts(out, rank, alignment, bounds)
        else:
            _plan_tokens(out, rank)
        out.num_dropped[rank, 0] = out.demand[rank].sum() - out.counts[rank].sum()
    return out


def deal_room(wanted: list[int], alignment: int, capacity: int) -> list[int]:
    """How many of the rows that they want the experts of a rank keep.

    Room is dealt in rounds. In each, an expert that wants more rows than it has gets ``alignment``
    more, those with the lowest ids first, until there is no room left.
    """
    room = [0] * len(wanted)
    left = capacity // alignment
    while left > 0 and any(w > r for w, r in zip(wanted, room, strict=True)):
        for local, rows in enumerate(wanted):
            if rows > room[local] and left > 0:
                room[local] += alignment
                left -= 1
    return [min(pair) for pair in zip(wanted, room, strict=True)]


def _plan_experts(out: Plan, rank: int, alignment: int, bounds: Limits) -> None:
    _, num_tokens, top_k = out.topk_idx.shape
    local_experts = out.counts.shape[1]
    used = np.zeros(len(out.recv_rows[rank]), np.int32)
    offset = 0
    demand = np.bincount(out.topk_idx[out.topk_idx >= 0], minlength=out.num_experts)
    demand = demand[rank * local_experts :][:local_experts]
    counts = deal_room(np.minimum(demand, bounds.per_expert).tolist(), alignment, out.capacity)
    for local, count in enumerate(counts):
        wanted = np.argwhere(out.topk_idx == rank * local_experts + local).tolist()
        for row, (source, token, k) in enumerate(wanted[:count], start=offset):
            index = source * num_tokens + token
            out.dest_row[source, token, k] = row
            out.recv_src[rank, row] = index * top_k + k
            out.recv_rows[rank, index, used[index]] = row
            used[index] += 1
        out.demand[rank, local] = len(wanted)
        out.counts[rank, local] = count
        out.group_sizes[rank, local] = round_up(count, alignment)
        offset += round_up(count, alignment)


def _plan_tokens(out: Plan, rank: int) -> None:
    num_ranks, num_tokens, _ = out.topk_idx.shape
    local_experts = out.counts.shape[1]
    row = 0
    for source in range(num_ranks):
        for token in range(num_tokens):
            entries = out.topk_idx[source, token].tolist()
            here = [(k, e % local_experts) for k, e in enumerate(entries) if e >= 0
                    and e // local_experts == rank]  # fmt: skip
            if not here:
                continue
            kept = row < out.capacity
            index = source * num_tokens + token
            for k, local in here:
                out.demand[rank, local] += 1
                if kept:
                    out.counts[rank, local] += 1
                    out.dest_row[source, token, k] = row
                    out.expert_idx[rank, row, k] = local
            if kept:
                out.recv_src[rank, row] = index
                out.recv_rows[rank, index, 0] = row
            row += 1
    out.group_sizes[rank] = out.counts[rank]


def move(x: np.ndarray, routes: Plan) -> np.ndarray:
    """Rows ``[R, C, ...]`` of the tokens ``x`` ``[R, T, ...]``; unused rows are zero."""
    rows = np.zeros((len(x), routes.capacity, *x.shape[2:]), x.dtype)
    for rank in range(len(x)):
        for row in range(routes.capacity):
            source = routes.source(rank, row)
            if source is not None:
                rows[rank, row] = x[source[0], source[1]]
    return rows


def move_weights(weights: np.ndarray, routes: Plan) -> np.ndarray:
    """Weights of rows, ``[R, C]`` or ``[R, C, K]``, from ``weights`` ``[R, T, K]``."""
    num_ranks, _, top_k = weights.shape
    by_token = routes.layout == "token"
    shape = (num_ranks, routes.capacity, top_k) if by_token else (num_ranks, routes.capacity)
    out = np.zeros(shape, np.float32)
    for rank in range(num_ranks):
        for row in range(routes.capacity):
            source = routes.source(rank, row)
            if source is None:
                continue
            if by_token:
                here = routes.expert_idx[rank, row] >= 0
                out[rank, row, here] = weights[source[0], source[1], here]
            else:
                out[rank, row] = weights[source]
    return out


def send_home(values: np.ndarray, routes: Plan) -> np.ndarray:
    """Values of rows, ``[R, C]`` or ``[R, C, K]``, back at their places ``[R, T, K]``."""
    home = np.zeros(routes.topk_idx.shape, np.float32)
    for rank, token, k in np.argwhere(routes.dest_row >= 0):
        where = routes.rank_of(routes.topk_idx[rank, token, k]), routes.dest_row[rank, token, k]
        home[rank, token, k] = values[where] if values.ndim == 2 else values[(*where, k)]
    return home


def combine(
    rows: np.ndarray,
    routes: Plan,
    weights: np.ndarray | None = None,
    ranks_per_host: int | None = None,
) -> np.ndarray:
    """Sum of each token's rows ``[R, T, H]`` in f32: on each rank, then over ranks.

    With ``ranks_per_host`` the ranks of each host are summed first, and then the hosts' sums.
    """
    num_ranks, num_tokens, _ = routes.topk_idx.shape
    out = np.zeros((num_ranks, num_tokens, rows.shape[-1]), rows.dtype)
    with np.errstate(all="ignore"):
        for home in range(num_ranks):
            for token in range(num_tokens):
                totals = []
                for rank in range(num_ranks):
                    if rank % (ranks_per_host or num_ranks) == 0:
                        totals.append(np.zeros(rows.shape[-1], np.float32))
                    partial = np.zeros(rows.shape[-1], np.float32)
                    for row in routes.recv_rows[rank, home * num_tokens + token]:
                        if row < 0:
                            continue
                        term = rows[rank, row].astype(np.float32)
                        if weights is not None:
                            term = weights[rank, row].astype(np.float32) * term
                        partial = partial + term
                    totals[-1] = totals[-1] + partial.astype(rows.dtype).astype(np.float32)
                total = totals[0].astype(rows.dtype)
                if len(totals) > 1:
                    rounded = (of_host.astype(rows.dtype).astype(np.float32) for of_host in totals)
                    total = sum(rounded, np.zeros(rows.shape[-1], np.float32)).astype(rows.dtype)
                out[home, token] = total
    return out


def combine_vjp(
    dy: np.ndarray, rows: np.ndarray, weights: np.ndarray, routes: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents of the rows ``[R, C, H]`` and fused weights ``[R, C]`` of ``combine``."""
    d_rows, d_weights = np.zeros_like(rows), np.zeros(weights.shape, np.float32)
    with np.errstate(all="ignore"):
        for rank in range(len(rows)):
            for row in range(routes.capacity):
                source = routes.source(rank, row)
                if source is None:
                    continue
                ct = dy[source[0], source[1]].astype(np.float32)
                d_rows[rank, row] = (weights[rank, row] * ct).astype(rows.dtype)
                d_weights[rank, row] = _dot(rows[rank, row].astype(np.float32), ct)
    return d_rows, d_weights


def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Dot product over 256 lanes, each in sequence, then by halves."""
    lanes, products = np.zeros(256, np.float32), a * b
    for start in range(0, len(products), 256):
        chunk = products[start : start + 256]
        lanes[: len(chunk)] += chunk
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def quantize(x: np.ndarray, scale_format: str = "f32") -> tuple[np.ndarray, np.ndarray]:
    """``x`` ``[..., H]`` as e4m3 values ``[..., H]`` and f32 scales ``[..., H / 128]``."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    with np.errstate(all="ignore"):
        amax = np.abs(blocks).max(axis=-1)
        scales = np.maximum(amax, np.float32(1e-30)) * (np.float32(1) / np.float32(448))
        if scale_format == "ue8m0":
            bits = (scales.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
            scales = np.where(np.isnan(scales), np.float32("nan"), bits.view(np.float32))
        scaled = blocks * (np.float32(1) / scales)[..., None]
        values = np.clip(scaled, np.float32(-448), np.float32(448)).astype(E4M3)
    return values.reshape(x.shape), scales


def dequantize(values: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The rows that ``values`` and ``scales`` stand for, in ``dtype``."""
    with np.errstate(all="ignore"):
        rows = values.astype(np.float32) * np.repeat(scales, BLOCK, axis=-1)
        return rows.astype(dtype)


def assert_same(actual, expected, what: str) -> None:
    """Compare shape, dtype and bits of ``actual`` with ``expected``; any NaN equals any NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    wrong = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    if expected.dtype.kind in "fV":
        wrong &= ~(np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32)))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements differ, the first at {first}: "
            f"{actual[first]!r}, not {expected[first]!r}"
        )
