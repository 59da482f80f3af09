"""More responses than a critique should read: they are dealt into groups, anew for every critique.

    request of n responses, at_once m < n
        -> k deals of the n responses into random groups of at most m, each read by one critique
        -> k critiques of all n responses, each joined from those of a deal's groups -> decide

Scores are pointwise, so that those of different groups can be added up (Eq. 14), and in every deal
a response is read beside others. A judge so reads more responses than it was trained on, or than
its longest prompt holds; what that is worth: `experiments/claims/responses.md`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Sequence

from grm_jax.data.preferences import Preference
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Judgement

Group = tuple[int, ...]


def size(request: JudgeRequest) -> int:
    """The responses of the largest group."""
    return math.ceil(len(request.record.responses) / request.groups)


def deal(request: JudgeRequest, sample: int) -> list[Group]:
    """The groups of one critique: indices of responses, in the order in which they are shown.

    Sizes differ by one at most. In pairs of an odd number the last response would be alone, with
    nothing to be compared with: it is shown beside one of the first pair, whose score in this group
    does not count.
    """
    n, groups = len(request.record.responses), request.groups
    order = random.Random(f"{request.record.id} {request.options.seed} {sample}").sample(
        range(n), n
    )
    bounds = [-(-i * n // groups) for i in range(groups + 1)]  # rounded up: the last is smallest
    dealt = [tuple(order[low:high]) for low, high in itertools.pairwise(bounds)]
    if len(dealt[-1]) == 1:
        dealt[-1] += dealt[0][:1]
    return dealt


def part(record: Preference, group: Group) -> Preference:
    """The record of a group's responses alone."""
    responses = tuple(record.responses[i] for i in group)
    return dataclasses.replace(record, responses=responses, labels=(0.0,) * len(group))


def join(
    request: JudgeRequest, sample: int, groups: Sequence[Group], critiques: Sequence[Judgement]
) -> Judgement:
    """One critique of all responses from those of the groups of a deal.

    Its texts follow one another. It has scores where all of them have, else the failure of the
    first that has none. The meta RM's score is their mean.
    """
    order: list[int] = []
    scores, expected = {}, {}
    for group, critique in zip(groups, critiques, strict=True):
        for place, index in enumerate(group):
            if index in order:  # it keeps the last response company
                continue
            order.append(index)
            scores[index] = critique.scores and critique.scores[place]
            expected[index] = critique.expected and critique.expected[place]
    failure = next((c.failure for c in critiques if c.failure is not None), None)
    n = len(order)
    metas = [c.meta for c in critiques if c.meta is not None]
    return Judgement(
        example_id=request.record.id,
        sample=sample,
        order=tuple(order),
        groups=tuple(groups),
        scores=None if failure else tuple(scores[i] for i in range(n)),
        failure=failure,
        finish_reason="length" if any(c.truncated for c in critiques) else "stop",
        text="\n\n".join(c.text for c in critiques),
        meta=statistics.fmean(metas) if len(metas) == len(critiques) and not failure else None,
        tokens=sum(c.tokens for c in critiques),
        principles="\n\n".join(c.principles for c in critiques),
        expected=None
        if failure or None in expected.values()
        else tuple(expected[i] for i in range(n)),
    )
