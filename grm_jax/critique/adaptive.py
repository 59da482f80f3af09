"""Adaptive k: when further samples of an item would not change its verdict.

Two rules. One is certain: the leader's margin exceeds what the samples still to come could make up.
The other states a probability: samples are taken as independent draws of one distribution, of which
those seen are a sample, and the chance that the final sum has another leader is bounded.

For a rival with margins d_1..d_m so far (mean d, variance s^2) and r samples to come, the final
margin is about normal with mean (m + r) d and variance r s^2 + r^2 s^2 / m: the spread of what is
to come, and of the mean it comes from. A little variance is added to s^2 (0.5 on a scale of 1..10,
in proportion on others), so that a few equal margins do not look certain. The chances against all
rivals are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from grm_jax.critique.voting import Scores, vote

BOUND = 0.01  # probability of another verdict that is usually accepted
_FLOOR = 0.5 / 81.0  # variance that is added, in squares of the width of the range
AT_LEAST = 4  # usable samples before the probability is believed


def beyond_reach(scores: Sequence[Scores | None], remaining: int, span: float = 9.0) -> bool:
    """Whether no `remaining` further samples can change the single leader.

    Args:
      scores: samples so far, by original index, or None where one failed.
      span: largest difference between two scores of one sample (1..10: 9).
    """
    if not any(sample is not None for sample in scores):
        return False
    totals = sorted(vote(scores).totals, reverse=True)
    return len(totals) > 1 and totals[0] - totals[1] > span * remaining


def variance_floor(width: float) -> float:
    """Variance that is added to that of margins, for scores of a range of this width."""
    return _FLOOR * width * width


def change_probability(
    scores: Sequence[Scores | None], remaining: int, width: float = 9.0
) -> float:
    """Bound on the probability that the verdict after `remaining` more samples is another one.

    1 with fewer than two usable samples, for a tie, and for a single response (whose verdict is a
    threshold of the user's).
    """
    used = [sample for sample in scores if sample is not None]
    if len(used) < 2 or len(used[0]) < 2:
        return 1.0
    verdict = vote(scores)
    if verdict.tie:
        return 1.0
    if remaining == 0:
        return 0.0
    m, r, leader = len(used), remaining, verdict.best[0]
    total = 0.0
    for rival in range(len(used[0])):
        if rival == leader:
            continue
        margins = [sample[leader] - sample[rival] for sample in used]
        mean = math.fsum(margins) / m
        variance = math.fsum((margin - mean) ** 2 for margin in margins) / (m - 1)
        variance += variance_floor(width)
        spread = math.sqrt(variance * (r + r * r / m))
        total += 0.5 * math.erfc((m + r) * mean / spread / math.sqrt(2.0))
    return min(1.0, total)


def decided(
    scores: Sequence[Scores | None],
    remaining: int,
    bound: float,
    *,
    at_least: int = AT_LEAST,
    span: float = 9.0,
    width: float | None = None,
) -> bool:
    """Stop sampling this item?

    A single response is decided against its threshold: give its scores as (score, threshold).

    Args:
      scores: samples so far. remaining: those still to come. span: as for `beyond_reach`.
      bound: probability of a change of verdict that is accepted; 0 stops only when it is certain.
      at_least: usable samples before the probability is believed.
      width: of the range of a score; default: span (of a single response, whose span is the way
        from its threshold to the farther end, give it).
    """
    if beyond_reach(scores, remaining, span):
        return True
    usable = sum(sample is not None for sample in scores)
    if bound <= 0 or usable < at_least:
        return False
    return change_probability(scores, remaining, span if width is None else width) <= bound
