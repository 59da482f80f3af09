"""k score lists -> one vote: orders to show the responses in, sums, ties, guided by a meta RM.

A sample is what `parse` made of one critique: n scores in the original order of the responses
(`unshuffle` first), or None where it failed. A failed sample is left out of the vote and counted.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

from grm_jax.critique.correctness import best_label

Item = TypeVar("Item")
Scores = Sequence[float]
SCALAR_WEIGHT = 0.5  # of a scalar RM's scores beside a vote


@dataclasses.dataclass(frozen=True)
class Vote:
    """The outcome of a vote over k samples. Without any usable sample all tuples are empty.

    Attributes:
        totals: n sums of scores over the samples used (Eq. 14).
        mean: totals / used, on the scale of a single score (Eq. 12 for semi-scalar models).
        best: 0-based indices of the responses with the largest total, ascending; more than one
            is a tie.
        kept: indices of the samples used, ascending.
        failed: number of samples without scores.
        left_out: number of samples with scores that the meta RM did not select.
        agreement: share of the used samples that have the winner among their own top scores,
            averaged over the winners of a tie. None without a used sample; 1 for n = 1.
    """

    totals: tuple[float, ...]
    mean: tuple[float, ...]
    best: tuple[int, ...]
    kept: tuple[int, ...]
    failed: int
    left_out: int
    agreement: float | None

    @property
    def used(self) -> int:
        return len(self.kept)

    @property
    def tie(self) -> bool:
        return len(self.best) > 1

    def pick(self, seed: int) -> int | None:
        """One best response, ties broken at random (shuffle, then argmax); None without a vote."""
        return random.Random(seed).choice(self.best) if self.best else None


def orders(
    n: int, k: int, *, mode: Literal["balanced", "random"] = "balanced", seed: int
) -> list[tuple[int, ...]]:
    """The order in which each of k samples sees the n responses.

    order[j] is the original index of the response shown in place j.

    balanced: the cyclic shifts of one random start order, in turn. Each response stands in each
    place equally often (within one, if n does not divide k), also after any number of samples,
    and the k samples need only min(k, n) distinct prompts. Example for n = 3: (2,0,1), (0,1,2),
    (1,2,0), (2,0,1), ...
    random: an independent order for each sample, as in the paper.

    The same seed gives the same orders, and orders(n, k) starts orders(n, k + 1).

    Raises:
        ValueError: n < 1, k < 0, or an unknown mode.
    """
    if n < 1 or k < 0:
        raise ValueError(f"n={n}, k={k}; there must be one response or more, and no negative k")
    generator = random.Random(seed)
    if mode == "balanced":
        start = generator.sample(range(n), n)
        return [tuple(start[(place + i) % n] for place in range(n)) for i in range(k)]
    if mode == "random":
        return [tuple(generator.sample(range(n), n)) for _ in range(k)]
    raise ValueError(f"mode={mode!r}; it is 'balanced' or 'random'")


def shuffle(items: Sequence[Item], order: Sequence[int]) -> list[Item]:
    """The items as `order` shows them: result[j] = items[order[j]]."""
    _check_order(len(items), order)
    return [items[index] for index in order]


@overload
def unshuffle(scores: None, order: Sequence[int]) -> None: ...
@overload
def unshuffle(scores: Sequence[Item], order: Sequence[int]) -> tuple[Item, ...]: ...
def unshuffle(scores: Sequence[Item] | None, order: Sequence[int]) -> tuple[Item, ...] | None:
    """Scores as shown -> scores by original index: result[order[j]] = scores[j]. None stays None.

    Raises:
        ValueError: `order` is not an order of as many responses as there are scores.
    """
    if scores is None:
        return None
    _check_order(len(scores), order)
    place_of = {index: place for place, index in enumerate(order)}
    return tuple(scores[place_of[index]] for index in range(len(order)))


def vote(
    scores: Sequence[Scores | None],
    *,
    meta: Sequence[float | None] | None = None,
    k_meta: int | None = None,
) -> Vote:
    """Eq. (14): the response with the largest sum of scores, over all samples or guided ones.

    Sums are exact (`math.fsum`) and then rounded to nine digits, so that neither the order of the
    samples nor binary fractions (1.1 + 3.1 against 2.1 + 2.1) make or break a tie.

    Args:
        scores: k samples, each n scores by original index, or None where it failed.
        meta: k meta RM scores (logits or probabilities; only their ranking matters). Those of
            failed samples are not read. The vote then uses the `k_meta` samples that rank highest
            among the parsed ones; equal meta scores go to the earlier sample.
        k_meta: how many to keep, 1..k; default max(1, k // 2). If fewer parsed, all of them.

    Raises:
        ValueError: no samples, samples of different lengths or without finite numbers, `meta` of
            another length or with a NaN for a parsed sample, or `k_meta` outside 1..k.
    """
    k = len(scores)
    if k == 0:
        raise ValueError("scores is empty; a vote needs one sample or more (None where it failed)")
    parsed = [index for index, sample in enumerate(scores) if sample is not None]
    samples = {index: _check_sample(scores, index, parsed[0]) for index in parsed}
    kept = _guided(parsed, meta, k_meta, k)
    if not kept:
        return Vote((), (), (), (), failed=k, left_out=0, agreement=None)
    used = [samples[index] for index in kept]
    totals = tuple(round(math.fsum(column), 9) for column in zip(*used, strict=True))
    best = _argmax(totals)
    agreeing = sum(winner in _argmax(sample) for sample in used for winner in best)
    return Vote(
        totals=totals,
        mean=tuple(total / len(used) for total in totals),
        best=best,
        kept=tuple(kept),
        failed=k - len(parsed),
        left_out=len(parsed) - len(kept),
        agreement=agreeing / (len(used) * len(best)),
    )


def weighted_vote(scores: Sequence[Scores | None], weights: Sequence[float]) -> Vote:
    """A vote in which sample i counts `weights[i]`; `mean` divides by the sum of the weights.

    Args:
        scores: as `vote` takes them.
        weights: one finite number >= 0 a sample; those of failed samples are not read.

    Raises:
        ValueError: as `vote` does, or for weights of another kind.
    """
    plain = vote(scores)
    if len(weights) != len(scores) or not all(
        0 <= weights[index] < math.inf for index in plain.kept
    ):
        raise ValueError(f"weights are {list(weights)}; give one finite number >= 0 a sample")
    kept = [index for index in plain.kept if weights[index] > 0]
    if not kept:
        return dataclasses.replace(vote([None] * len(scores)), failed=plain.failed)
    used = [_check_sample(scores, index, kept[0]) for index in kept]
    norm = math.fsum(weights[index] for index in kept)
    totals = tuple(
        round(math.fsum(weights[i] * score for i, score in zip(kept, column, strict=True)), 9)
        for column in zip(*used, strict=True)
    )
    best = _argmax(totals)
    agreeing = math.fsum(
        weights[index] * (winner in _argmax(sample))
        for index, sample in zip(kept, used, strict=True)
        for winner in best
    )
    return Vote(
        totals=totals,
        mean=tuple(total / norm for total in totals),
        best=best,
        kept=tuple(kept),
        failed=plain.failed,
        left_out=len(plain.kept) - len(kept),
        agreement=agreeing / (norm * len(best)),
    )


def hybrid_scores(
    means: Sequence[Any], scalar: Sequence[Any], weight: float = SCALAR_WEIGHT
) -> list[Any]:
    """Votes plus a scalar RM: mean scores + weight * scalar scores, each centred over n responses.

    Only the differences of responses count, so that a single response always has the value 0. Round
    the values before comparing them, since the order of float additions may break ties.

    Args:
        means: for each response its mean score in a vote, or a NumPy array of those in many votes.
        scalar: for each response the scalar RM's score, or an array that broadcasts to those of
            `means`.
        weight: of the scalar scores, whose scale differs from one scalar RM to another.

    Returns:
        For each response the number, or the array, by which it is ranked.
    """
    n = len(means)
    vote, other = sum(means) / n, sum(scalar) / n
    return [
        (mean - vote) + weight * (score - other) for mean, score in zip(means, scalar, strict=True)
    ]


def mean_scores(scalars: Sequence[Scores | None]) -> tuple[float, ...]:
    """Eq. (12), semi-scalar models: the mean scalar of each response; () if all failed."""
    return vote(scalars).mean


def majority(choices: Sequence[int | None], n: int) -> Vote:
    """Eq. (13), pairwise generative models: the response chosen most often.

    Args:
        choices: k chosen responses, 0-based by original index, or None where a sample failed.
        n: number of responses.

    Raises:
        ValueError: no samples, or a choice that is not one of the n responses.
    """
    for index, choice in enumerate(choices):
        if choice is not None and not 0 <= choice < n:
            raise ValueError(f"choices[{index}] is {choice}; it is a 0-based index, 0..{n - 1}")
    return vote(
        [
            None if choice is None else tuple(float(index == choice) for index in range(n))
            for choice in choices
        ]
    )


def credit(verdict: Vote, labels: Sequence[float], threshold: float | None = None) -> float:
    """Expected accuracy of a verdict when ties are broken by a shuffle, as in evaluation.

    1 / |best| if the best response by `labels` is among the best of the vote, otherwise 0. A single
    response is judged by its mean score: above the threshold says correct (label 1), below says
    incorrect (label 0), equal is a toss-up and earns 0.5. A vote without a usable sample earns 0:
    what failed is wrong, not a coin toss.

    `scoring.measures.credit` computes the same for many votes at once, by the rules of a benchmark.

    Raises:
        ValueError: another number of labels than responses, no single best label, or a single
            response without a threshold or with a label other than 0 and 1.
    """
    if verdict.totals and len(verdict.totals) != len(labels):
        raise ValueError(
            f"the verdict is about {len(verdict.totals)} responses, labels has {len(labels)}"
        )
    if len(labels) > 1:
        return 1.0 / len(verdict.best) if best_label(labels) in verdict.best else 0.0
    if threshold is None:
        raise ValueError("a single response has no best one; give a threshold for its score")
    if labels[0] not in (0, 1):
        raise ValueError(f"label is {labels[0]}; a single response is correct (1) or incorrect (0)")
    if not verdict.mean:
        return 0.0
    (mean,) = verdict.mean
    return 0.5 if mean == threshold else float((mean > threshold) == (labels[0] == 1))


def _argmax(scores: Scores) -> tuple[int, ...]:
    top = max(scores)
    return tuple(index for index, score in enumerate(scores) if score == top)


def _check_order(n: int, order: Sequence[int]) -> None:
    if sorted(order) != list(range(n)):
        raise ValueError(f"order {tuple(order)} is not an order of {n} responses, 0..{n - 1}")


def _check_sample(scores: Sequence[Scores | None], index: int, first: int) -> Scores:
    sample, reference = scores[index], scores[first]
    assert sample is not None and reference is not None
    if len(sample) != len(reference) or not len(sample):
        raise ValueError(
            f"sample {index} has {len(sample)} scores, sample {first} has {len(reference)}; "
            "each sample has one score a response, or is None"
        )
    if not all(math.isfinite(score) for score in sample):
        raise ValueError(
            f"sample {index} is {tuple(sample)}; scores are finite, a failed sample is None"
        )
    return sample


def _guided(
    parsed: list[int], meta: Sequence[float | None] | None, k_meta: int | None, k: int
) -> list[int]:
    if meta is None:
        if k_meta is not None:
            raise ValueError("k_meta without meta; give the meta RM's scores or leave k_meta out")
        return parsed
    if len(meta) != k:
        raise ValueError(f"{len(meta)} meta scores for {k} samples; give one a sample")
    if k_meta is None:
        k_meta = max(1, k // 2)
    if not 1 <= k_meta <= k:
        raise ValueError(f"k_meta is {k_meta} of {k} samples; it is 1..{k}")
    ranked: list[tuple[float, int]] = []
    for index in parsed:
        value = meta[index]
        if value is None or math.isnan(value):
            raise ValueError(f"meta[{index}] is {value}, but sample {index} has scores to rank")
        ranked.append((-value, index))
    return sorted(index for _, index in sorted(ranked)[:k_meta])
