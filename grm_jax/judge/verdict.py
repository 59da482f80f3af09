"""What a judge answers: from k critiques of n responses to scores, a winner, or a named failure.

    k critiques (+ scalar scores) -> vote | guided | weighted | hybrid -> Verdict -> JSON

A verdict without a readable critique has a `failure` and no numbers: whoever uses it decides what
a failure is worth to him. Plain Python.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from grm_jax.critique.voting import Vote, hybrid_scores, vote, weighted_vote
from grm_jax.data.critiques import Critique
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, ScoreOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement(Critique):
    """One critique of a verdict.

    Attributes:
      principles: what it says that it judges by.
      expected: by response, the mean of the distribution from which the score was drawn.
      votes: whether it is among those that decide.
      groups: where the responses were dealt into groups (`dealt.py`), which of them were shown
        together, in their order; None: all of them, in `order`.
    """

    principles: str = ""
    expected: tuple[float, ...] | None = None
    votes: bool = True
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def shown(self) -> tuple[tuple[int, ...], ...]:
        """The responses that were shown together, in their order."""
        return (self.order,) if self.groups is None else self.groups

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": self.scores,
            "failure": self.failure,
            "principles": self.principles,
            "critique": self.text,
            "order": self.order,
            "groups": self.groups,
            "meta": self.meta,
            "expected": self.expected,
            "votes": self.votes,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }


@dataclasses.dataclass(frozen=True)
class Completion:
    """One reply of the model to a chat.

    Attributes:
      tokens: the ids that were drawn, the end token's included. logprobs: of each, as it was drawn.
      finish_reason: "stop" or "length".
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class ScalarScores:
    """The scalar RM's score of each response to a conversation.

    Attributes:
      prompt_tokens: that it read: the conversation with each response.
    """

    scores: tuple[float, ...]
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class LabelLogprobs:
    """What a `LabelRequest` is answered with.

    Attributes:
      logprobs: by item, of each label, over the whole vocabulary.
      prompt_tokens: of all prompts.
    """

    logprobs: tuple[tuple[float, ...], ...]
    prompt_tokens: int

    def probabilities(self, *, among_labels: bool) -> list[tuple[float, ...]]:
        """By item, of each label; `among_labels`: given that the token is one of the labels."""
        found = []
        for row in self.logprobs:
            least = max(row) if among_labels else 0.0  # so that not all of them round to zero
            masses = [math.exp(value - least) for value in row]
            total = sum(masses) if among_labels else 1.0
            found.append(tuple(mass / total for mass in masses))
        return found


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a verdict cost. prompt_tokens: of its distinct prompts, each read once."""

    prompt_tokens: int = 0
    sampled_tokens: int = 0
    samples: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judge's answer to one request. By-response tuples stand in the request's order.

    Attributes:
      id: the digest of the request's texts.
      method: how the critiques were put together; see `ScoreOptions.method`.
      scores: mean score of each response over the critiques that vote; () where there is a failure.
      totals: their sums (Eq. 14); with `weighted` weighted sums.
      values: what ranks the responses: the totals, or with `hybrid` the centred means plus the
        weighted centred scalar scores.
      rewards: ranks of the values in 0..1 (0 the worst, 1 the best, ties share their mean rank);
        for a single response its mean score within the template's range.
      best: the responses with the largest value; several: a tie.
      std: standard deviation of each response's scores over the critiques that vote.
      agreement: share of the critiques that vote whose own top score is the winner's.
      scalar: the scalar RM's score of each response, if the judge has one.
      failure: why there are no numbers: the commonest failure of the critiques; None if there are.
      failures: how many critiques failed, by name.
      critiques: every one, readable or not.
      judge: fingerprint of the weights and templates that answered.
      seed: of the request. seconds: from its beginning to its end.
    """

    id: str
    method: str
    scores: tuple[float, ...]
    totals: tuple[float, ...]
    values: tuple[float, ...]
    rewards: tuple[float, ...]
    best: tuple[int, ...]
    std: tuple[float, ...]
    agreement: float | None
    failure: str | None
    failures: dict[str, int]
    critiques: tuple[Judgement, ...]
    scalar: tuple[float, ...] | None = None
    usage: Usage = Usage()
    judge: str = ""
    seed: int = 0
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def winner(self) -> int | None:
        """Index of the best response; None for a tie and for a failure."""
        return self.best[0] if len(self.best) == 1 else None

    @property
    def tie(self) -> bool:
        return len(self.best) > 1

    def to_json(self, *, critiques: bool = True) -> dict[str, Any]:
        """The verdict as JSON; tuples become lists. `critiques`: False leaves their texts out."""
        said = {name: getattr(self, name) for name in _JSON}
        said |= {"winner": self.winner, "tie": self.tie, "usage": dataclasses.asdict(self.usage)}
        said["seconds"] = round(self.seconds, 3)
        if critiques:
            said["critiques"] = [row.to_json() for row in self.critiques]
        return said


_JSON = (
    "id", "method", "scores", "totals", "values", "rewards", "best", "std", "agreement", "failure",
    "failures", "scalar", "judge", "seed",
)  # fmt: skip


def decide(
    request: JudgeRequest,
    critiques: Sequence[Judgement],
    *,
    scale: tuple[float, float],
    guided: bool = False,
    scalar: Sequence[float] | None = None,
    **fields: Any,
) -> Verdict:
    """The verdict of the critiques of one request.

    Args:
      scale: the range of a score in the template.
      guided: whether the judge has a meta RM, whose logits then stand in the critiques.
      scalar: the scalar RM's score of each response.
      fields: `usage`, `judge`, `seconds` of the verdict.

    Raises UserError for a method that the judge, or a single response, does not allow.
    """
    options, n = request.options, len(request.record.responses)
    method = options.method or ("guided" if guided else "vote")
    require_method(method, n, guided=guided, scalar=scalar is not None)
    samples = [row.expected if options.expected and row.expected and row.scores else row.scores
               for row in critiques]  # fmt: skip
    outcome = _vote(method, samples, [row.meta for row in critiques], options)
    kept = set(outcome.kept)
    rows = tuple(
        dataclasses.replace(row, votes=index in kept) for index, row in enumerate(critiques)
    )
    used = [scores for index in outcome.kept if (scores := samples[index]) is not None]
    values = outcome.totals
    if method == "hybrid" and used:
        assert scalar is not None
        hybrid = hybrid_scores(outcome.mean, scalar, options.scalar_weight)
        values = tuple(round(value, 9) for value in hybrid)
    failed = collections.Counter(str(row.failure) for row in critiques if row.failure)
    return Verdict(
        id=request.record.id,
        method=method,
        scores=outcome.mean,
        totals=outcome.totals,
        values=values,
        rewards=_rewards(values, outcome.mean, scale),
        best=tuple(i for i, value in enumerate(values) if value == max(values)),
        std=tuple(statistics.pstdev(column) for column in zip(*used, strict=True)),
        agreement=outcome.agreement,
        failure=None if used else failed.most_common(1)[0][0],
        failures=dict(sorted(failed.items())),
        critiques=rows,
        scalar=None if scalar is None else tuple(scalar),
        seed=options.seed,
        **fields,
    )


def require_method(method: str, n: int, *, guided: bool, scalar: bool) -> None:
    """Raise UserError for a method that needs what the judge does not have."""
    if method in ("guided", "weighted") and not guided:
        raise UserError(
            f"method {method!r} needs a meta RM, and this judge has none; load it with one "
            "(meta=..., --meta), or leave the method out"
        )
    if method == "hybrid" and not scalar:
        raise UserError(
            "method 'hybrid' needs a scalar RM, and this judge has none; load it with one "
            "(scalar=..., --scalar), or leave the method out"
        )
    if method == "hybrid" and n < 2:
        raise UserError(
            "method 'hybrid' compares responses, and there is a single one; give two or more, or "
            "another method"
        )


def _vote(
    method: str,
    samples: Sequence[Sequence[float] | None],
    meta: Sequence[float | None],
    options: ScoreOptions,
) -> Vote:
    if method == "guided":
        return vote(
            samples, meta=meta, k_meta=min(options.k_meta or max(1, options.k // 2), len(samples))
        )
    if method == "weighted":
        weights = [0.0 if logit is None else 1 / (1 + math.exp(-logit)) for logit in meta]
        return weighted_vote(samples, weights)
    return vote(samples)


def _rewards(
    values: Sequence[float], mean: Sequence[float], scale: tuple[float, float]
) -> tuple[float, ...]:
    """Ranks in 0..1; of a single response its mean score within the range."""
    if len(values) == 1:
        low, high = scale
        return ((mean[0] - low) / (high - low),)
    return tuple(
        (sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2)
        / (len(values) - 1)
        for value in values
    )
