"""Scores against labels: correctness (Eq. 10), the rule reward (Eq. 11), the filters of RFT.

`scores` and `labels` have one number for each response, in the same order. The scores of an
unparsable sample are None: it is incorrect, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from grm_jax.errors import UserError

TieRule = Literal["paper", "expected"]


def best_label(labels: Sequence[float]) -> int:
    """The 0-based index j of the best response, j = argmax r.

    Raises:
        UserError: no labels, a label that is NaN, or no single largest one (the rules below are
            only defined for a single best response).
    """
    if not labels:
        raise UserError("labels is empty; give one label a response")
    if any(math.isnan(label) for label in labels):
        raise UserError(f"labels {tuple(labels)} hold a NaN; give a number a response")
    top = max(labels)
    best = [index for index, label in enumerate(labels) if label == top]
    if len(best) > 1:
        raise UserError(
            f"labels {tuple(labels)} have {len(best)} best responses; the ground truth must have "
            "a single one: drop one of the tied responses or the whole record"
        )
    return best[0]


def is_correct(
    scores: Sequence[float] | None, labels: Sequence[float], *, threshold: float | None = None
) -> bool:
    """Eq. (10). n >= 2: the best response scores strictly above every other; n = 1: S_1 = r_1.

    A tie for the top score is incorrect, and so is None (no scores).

    Args:
        threshold: for n = 1 with a template whose scores are not the labels 0 and 1
            (`Template.threshold`): a score above it calls the response correct, one below it
            incorrect, and one exactly on it is wrong for either label.

    Raises:
        ValueError: the numbers of scores and labels differ, or there is no single best label.
    """
    best = best_label(labels)
    if scores is None:
        return False
    _check_lengths(scores, labels)
    if len(labels) == 1:
        if threshold is None:
            return scores[0] == labels[0]
        return scores[0] != threshold and (scores[0] > threshold) == (labels[0] == 1)
    return all(scores[best] > score for index, score in enumerate(scores) if index != best)


def rule_reward(
    scores: Sequence[float] | None,
    labels: Sequence[float],
    *,
    tie: TieRule = "paper",
    threshold: float | None = None,
) -> float:
    """Eq. (11): +1 if correct by Eq. (10), otherwise -1. There is no format reward.

    Args:
        tie: "paper" counts a tie for the top score as incorrect. "expected" is the expectation of
            the reward if the tie is broken at random, as in evaluation: 2 / w - 1 if the best
            response is among the w with the top score, so 0 for w = 2. The strict rule rewards a
            policy for inventing small faults that break ties; the expectation does not.
        threshold: as for `is_correct`; with tie="expected", a single response exactly on it gets 0.

    Raises:
        ValueError: the numbers of scores and labels differ, there is no single best label, or
            `tie` is unknown.
    """
    if tie not in ("paper", "expected"):
        raise ValueError(f"tie={tie!r}; it is 'paper' or 'expected'")
    if tie == "expected" and scores is not None and len(labels) == 1 and scores[0] == threshold:
        return 0.0
    if tie == "paper" or scores is None or len(labels) == 1:
        return 1.0 if is_correct(scores, labels, threshold=threshold) else -1.0
    best = best_label(labels)
    _check_lengths(scores, labels)
    top = max(scores)
    if scores[best] < top:
        return -1.0
    return 2.0 / sum(score == top for score in scores) - 1.0


def decisive(scores: Sequence[float], *, threshold: float | None = None) -> bool:
    """Whether one response alone has the top score; a single response is not on its threshold.

    A critique that is not decisive has no vote between the responses that share its top score.
    """
    if len(scores) == 1:
        return scores[0] != threshold
    return sum(score == max(scores) for score in scores) == 1


def too_easy(corrects: Sequence[bool]) -> bool:
    """Whether all samples of a record are correct, so that nothing can be learnt from it.

    RFT rejects all non-hinted samples of such a record. False for no samples.
    """
    return bool(corrects) and all(corrects)


def keep_rft(corrects: Sequence[bool]) -> list[bool]:
    """Which of a record's N_RFT non-hinted samples rejective fine-tuning keeps.

    Incorrect samples are rejected, and all samples if all are correct (too easy). With N = 1
    nothing is ever kept, so draw at least two.
    """
    easy = too_easy(corrects)
    return [bool(correct) and not easy for correct in corrects]


def keep_hinted(correct: bool) -> bool:
    """Whether RFT keeps a hinted sample: if it is correct. The filter for easy records is not
    used."""
    return bool(correct)


def _check_lengths(scores: Sequence[float], labels: Sequence[float]) -> None:
    if len(scores) != len(labels):
        raise ValueError(
            f"{len(scores)} scores for {len(labels)} labels; give one of each a response "
            "(an unparsable sample is None)"
        )
