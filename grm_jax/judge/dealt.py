"""More responses than a critique should read: they are dealt into groups, anew for every critique.

    request of n responses, at_once m < n
        -> k deals: the n responses in random groups of at most m
        -> a request of one critique for each group (`session.JudgeSession` runs them like others)
        -> k critiques of all n responses, each joined from those of a deal's groups -> decide

Scores are pointwise, so that those of different groups can be added up (Eq. 14), and over k deals
nearly all responses meet. A judge so reads more responses than it was trained on, or than its
longest prompt holds; what that is worth: `experiments/claims/responses.md`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import statistics
from collections.abc import Sequence

from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Judgement

Group = tuple[int, ...]


def is_dealt(request: JudgeRequest) -> bool:
    """Whether the request has more responses than a critique of it may read."""
    at_once = request.options.at_once
    return at_once is not None and len(request.record.responses) > at_once


def deal(request: JudgeRequest, sample: int) -> list[Group]:
    """The groups of one critique: indices of responses, in the order in which they are shown.

    Sizes differ by one at most. In pairs of an odd number the last response would be alone, with
    nothing to be compared with: it is shown beside one of the first pair, whose score in this group
    does not count.
    """
    n, at_once = len(request.record.responses), request.options.at_once
    assert at_once is not None
    order = random.Random(f"{request.record.id} {request.options.seed} {sample}").sample(
        range(n), n
    )
    count = -(-n // at_once)
    bounds = [-(-i * n // count) for i in range(count + 1)]  # the larger groups first
    groups = [tuple(order[low:high]) for low, high in itertools.pairwise(bounds)]
    if len(groups[-1]) == 1:
        groups[-1] += groups[0][:1]
    return groups


def part(request: JudgeRequest, sample: int, group: Group) -> JudgeRequest:
    """The request of one critique of a group."""
    record, options = request.record, request.options
    digest = hashlib.blake2b(f"{options.seed} {sample}".encode(), digest_size=7).digest()
    return JudgeRequest(
        dataclasses.replace(
            record,
            id=f"{record.id} {' '.join(map(str, group))}",
            responses=tuple(record.responses[i] for i in group),
            labels=(0.0,) * len(group),
        ),
        dataclasses.replace(
            options, k=1, k_meta=None, method="vote", adaptive=None, at_once=None, order="given",
            seed=int.from_bytes(digest, "little"),
        ),
    )  # fmt: skip


def join(
    request: JudgeRequest, sample: int, groups: Sequence[Group], critiques: Sequence[Judgement]
) -> Judgement:
    """One critique of all responses from those of the groups of a deal.

    Its texts follow one another. It has scores where all of them have, else the failure of the
    first that has none. The meta RM's score is their mean.
    """
    order: list[int] = []
    sizes: list[int] = []
    scores, expected = {}, {}
    for group, critique in zip(groups, critiques, strict=True):
        new = [(place, index) for place, index in enumerate(group) if index not in order]
        sizes.append(len(new))
        for place, index in new:
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
        groups=tuple(sizes),
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
