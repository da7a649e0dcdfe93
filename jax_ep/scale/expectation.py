"""How many ranks and hosts a token needs on average, and how many padded rows an expert gets.

A token has K different experts of E. With a limit, experts form G equal groups of consecutive ids, the
``top_groups`` groups with the best experts are kept, and the K best experts in them are chosen. Scores
are taken to be independent and equally distributed. Sorted by score, the experts are then a random
permutation, and the groups that are kept are the first ones to appear in it.
"""

from __future__ import annotations

import functools
import math

import numpy as np

# Beyond this many standard deviations a count of tokens is taken to be impossible.
_DEVIATIONS = 12


@functools.cache
def distinct_units(
    units: int, *, experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1
) -> float:
    """Expected number of different units with an expert of a token.

    Args:
        units: Ranks, hosts or whatever holds E / units consecutive experts.
        experts: E.
        top_k: K.
        num_groups: G, equal groups of consecutive experts; 1 for routing without a limit.
        top_groups: Groups that a token's experts may be in.

    Raises:
        ValueError: unless experts can be divided by units and groups, and units and groups lie within
            each other.
    """
    if units < 1 or experts % units:
        raise ValueError(
            f"units: expected a divisor of the {experts} experts, got {units}: each rank and each host "
            f"holds equally many."
        )
    if num_groups < 1 or experts % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {experts} experts, got {num_groups}."
        )
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups: expected 1 to {num_groups} groups, got {top_groups}.")
    in_unit, in_group = experts // units, experts // num_groups
    if not 1 <= top_k <= top_groups * in_group:
        raise ValueError(
            f"top_k: expected 1 to {top_groups * in_group} experts, got {top_k}: so many are in "
            f"{top_groups} of {num_groups} groups."
        )
    if in_group % in_unit and in_unit % in_group:
        raise ValueError(
            f"num_groups: expected groups within units or units within groups, got {num_groups} groups "
            f"of {in_group} experts and {units} units of {in_unit}."
        )
    if units == 1:
        return 1.0
    expected = 0.0
    for counts, probability in count_distribution(top_k, num_groups, top_groups, in_group):
        if in_group % in_unit == 0:
            found = sum(_hit(in_group // in_unit, in_group, count) for count in counts)
        else:
            found = _hit(units, num_groups, len(counts))
        expected += probability * found
    return expected


def _hit(parts: int, size: int, chosen: int) -> float:
    """Expected parts hit by ``chosen`` of ``size`` things without replacement; parts are equal."""
    missed = math.comb(size - size // parts, chosen) / math.comb(size, chosen)
    return parts * (1 - missed)


@functools.cache
def count_distribution(
    top_k: int, num_groups: int, top_groups: int, in_group: int
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """How a token's K experts are spread over groups.

    The experts are drawn one by one, the best first. Until ``top_groups`` groups have appeared, each
    expert that is left is equally likely; from then on, each that is left in these groups.

    Returns:
        Pairs of the numbers of experts in the groups that have any, in descending order, and their
        probability. The probabilities sum to 1.
    """
    states: dict[tuple[int, ...], float] = {(): 1.0}
    for drawn in range(top_k):
        following: dict[tuple[int, ...], float] = {}
        for counts, probability in states.items():
            opened = len(counts)
            open_to_draw = num_groups if opened < top_groups else top_groups
            left = open_to_draw * in_group - drawn
            for place, count in enumerate(counts):
                more = (*counts[:place], count + 1, *counts[place + 1 :])
                key = tuple(sorted(more, reverse=True))
                share = probability * (in_group - count) / left
                following[key] = following.get(key, 0.0) + share
            if opened < top_groups:
                key = (*counts, 1)
                share = probability * (num_groups - opened) * in_group / left
                following[key] = following.get(key, 0.0) + share
        states = {counts: share for counts, share in following.items() if share > 0}
    return tuple(states.items())


@functools.cache
def padded_rows(tokens: int, probability: float, alignment: int) -> float:
    """Expected rows of an expert with its padding.

    Args:
        tokens: Tokens of all ranks. Each has the expert with ``probability``, independently of the
            others.
        probability: K / E.
        alignment: Rows are padded to a multiple of it; an expert without tokens has no rows.
    """
    mean = tokens * probability
    if alignment == 1 or probability == 1:
        return float(-(-mean // alignment) * alignment) if probability == 1 else mean
    width = _DEVIATIONS * math.sqrt(mean) + alignment
    counts = np.arange(max(0, int(mean - width)), min(tokens, int(mean + width)) + 1)
    log_factorial = np.array([math.lgamma(n + 1) for n in (*counts, *(tokens - counts))])
    log_chosen, log_rest = np.split(log_factorial, 2)
    log_share = math.lgamma(tokens + 1) - log_chosen - log_rest
    log_share += counts * math.log(probability) + (tokens - counts) * math.log1p(-probability)
    shares = np.exp(log_share)
    return float((-(-counts // alignment) * alignment * shares).sum() / shares.sum())
