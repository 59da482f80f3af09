"""Adaptive k, replayed on drawn samples: after how many samples would each record have stopped?

The rule is `critique.adaptive.decided`, here for many records at once.

Dimensions: R records with n responses, K samples.
"""

from __future__ import annotations

import numpy as np

from grm_jax.critique.adaptive import AT_LEAST, variance_floor


def decided_after(
    scores: np.ndarray, bound: float, low: float, high: float, threshold: float | None = None
) -> np.ndarray:
    """The number of samples after which each record is decided, at most K: [R].

    Args:
        scores: [R, K, n]; NaN where a sample failed.
        bound: the accepted probability of another verdict; 0 accepts only certain verdicts.
        low, high: the range of a score.
        threshold: what single responses are compared with; default: the middle of the range.
    """
    from scipy.special import erfc  # takes a while to load, and few commands need it

    records, samples, n = scores.shape
    span = high - low
    floor = variance_floor(high - low)
    if n == 1:
        middle = (low + high) / 2 if threshold is None else threshold
        against = np.where(np.isnan(scores), np.nan, middle)
        scores = np.concatenate([scores, against], axis=2)
        span = max(high - middle, middle - low)
    usable = ~np.isnan(scores[..., 0])
    filled = np.where(usable[..., None], scores, 0.0)
    totals = np.cumsum(filled, axis=1)  # [R, K, n]
    products = np.cumsum(filled[..., :, None] * filled[..., None, :], axis=1)  # [R, K, n, n]
    counts = np.cumsum(usable, axis=1)  # [R, K]
    rows = np.arange(records)
    stop = np.full(records, samples)
    open_ = np.ones(records, bool)
    for place in range(samples - 1):
        total, used, left = totals[:, place], counts[:, place], samples - 1 - place
        ranked = np.sort(total, axis=1)
        leader = total.argmax(axis=1)
        margin = ranked[:, -1] - ranked[:, -2]
        certain = (used > 0) & (margin > span * left)
        m = np.maximum(used, 2).astype(float)[:, None]
        mean = (total[rows, leader][:, None] - total) / m  # [R, n]; the leader's own is 0
        square = (
            products[rows, place, leader, leader][:, None]
            - 2 * products[rows, place, leader]
            + products[:, place].diagonal(axis1=1, axis2=2)
        )
        variance = np.maximum(square - m * mean**2, 0.0) / (m - 1) + floor
        spread = np.sqrt(variance * (left + left * left / m))
        chance = 0.5 * erfc((m + left) * mean / spread / np.sqrt(2.0))
        chance[rows, leader] = 0.0
        likely = (used >= AT_LEAST) & (margin > 0) & (bound > 0) & (chance.sum(axis=1) <= bound)
        now = open_ & (certain | likely)
        stop[now] = place + 1
        open_ &= ~now
    return stop
