"""A request as the sampler reads it: token ids, and what has come of it so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from grm_jax.critique import Template
from grm_jax.data.collate import Example
from grm_jax.errors import UserError
from grm_jax.judge import dealt
from grm_jax.judge.base import JudgeModel
from grm_jax.judge.critiques import AdaptiveK
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Judgement, Usage, Verdict, require_method
from grm_jax.sampler.options import SamplingConfig

_ROUND = AdaptiveK.together  # samples of a request that adaptive sampling draws at once


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """What a request that is judged whole and one whose responses are dealt have in common.

    Attributes:
      replies: what the scalar RM reads; () without one.
      rows: critiques so far, by sample.
      asked: how many samples were begun.
    """

    request: JudgeRequest
    template: Template
    sampling: SamplingConfig
    replies: Sequence[Example] = ()
    rows: dict[int, Judgement] = dataclasses.field(default_factory=dict)
    asked: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        raise NotImplementedError

    @property
    def prompt_tokens(self) -> int:
        """Of all distinct prompts."""
        raise NotImplementedError

    def next_round(self) -> range:
        """The samples to begin next: all, or a few with adaptive sampling."""
        options, begin = self.request.options, self.asked
        self.asked = options.k if options.adaptive is None else min(begin + _ROUND, options.k)
        return range(begin, self.asked)

    @property
    def ended(self) -> bool:
        """Whether all samples have ended, or those that were not drawn yet would hardly change the
        verdict."""
        options = self.request.options
        if len(self.rows) < self.asked:
            return False
        if self.asked == options.k:
            return True
        rule = AdaptiveK(options.adaptive or 0.0, threshold=options.threshold)
        scores = [self.rows[index].scores for index in sorted(self.rows)]
        return rule.decided(self.template, scores, options.k - self.asked)


@dataclasses.dataclass(kw_only=True)
class Whole(Prepared):
    """A request of which every critique reads all responses.

    Attributes:
      orders: how each of the k samples sees the responses.
      prompts: token ids by order.
    """

    orders: list[tuple[int, ...]]
    prompts: dict[tuple[int, ...], tuple[int, ...]]

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts.values()))

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts.values()))


@dataclasses.dataclass(kw_only=True)
class Dealt(Prepared):
    """A request whose responses are dealt into groups (`dealt.py`).

    Attributes:
      groups: of each of the k samples.
      parts: the request of each group, by sample.
      critiques: of groups, by sample and place of the group: of samples that have not ended.
      read: tokens of the prompts that were read.
    """

    groups: list[list[dealt.Group]]
    parts: list[list[Whole]]
    critiques: dict[int, dict[int, Judgement]] = dataclasses.field(default_factory=dict)
    read: int = 0

    @property
    def longest(self) -> int:
        return max(part.longest for parts in self.parts for part in parts)

    @property
    def prompt_tokens(self) -> int:
        return self.read

    def take(self, sample: int, place: int, verdict: Verdict) -> None:
        """The verdict on a group; the last one of a sample makes it a critique of all responses."""
        (critique,) = verdict.critiques
        self.read += verdict.usage.prompt_tokens
        of_sample = self.critiques.setdefault(sample, {})
        of_sample[place] = critique
        groups = self.groups[sample]
        if len(of_sample) == len(groups):
            del self.critiques[sample]
            critiques = [of_sample[i] for i in range(len(groups))]
            self.rows[sample] = dealt.join(self.request, sample, groups, critiques)


def prepare(judge: JudgeModel, request: JudgeRequest) -> Whole | Dealt:
    """A request as token ids. Raises UserError for one that this judge can not judge."""
    options, record = request.options, request.record
    require_method(
        options.method or "vote", len(record.responses),
        guided=judge.guided, scalar=judge.has_scalar,
    )  # fmt: skip
    replies: Sequence[Example] = ()
    if judge.has_scalar:
        replies = judge.scalar.examples(record.turns, record.responses)
    if not dealt.is_dealt(request):
        return dataclasses.replace(_whole(judge, request), replies=replies)
    groups = [dealt.deal(request, sample) for sample in range(options.k)]
    parts = [
        [_whole(judge, dealt.part(request, sample, group)) for group in of_sample]
        for sample, of_sample in enumerate(groups)
    ]
    first = parts[0][0]
    return Dealt(
        request=request, template=first.template, sampling=first.sampling, replies=replies,
        groups=groups, parts=parts,
    )  # fmt: skip


def _whole(judge: JudgeModel, request: JudgeRequest) -> Whole:
    options, record = request.options, request.record
    prompts = judge.prompts(options)
    orders = prompts.orders(record, options.k)
    prepared = Whole(
        request=request,
        template=prompts.template(record),
        sampling=judge.sampling(options),
        orders=orders,
        prompts={order: prompts.ids(record, order) for order in dict.fromkeys(orders)},
    )
    limit = judge.model.max_position - prepared.sampling.max_new_tokens
    if prepared.longest > limit:
        raise UserError(
            f"the prompt has {prepared.longest:,} tokens, and {limit:,} leave room for a critique; "
            "shorten the texts, let a critique read fewer responses (at_once), or allow it fewer "
            "tokens (max_new_tokens)"
        )
    return prepared


def usage(prepared: Prepared, judged: Sequence[Judgement]) -> Usage:
    """What the critiques of a request cost."""
    return Usage(
        prompt_tokens=prepared.prompt_tokens,
        sampled_tokens=sum(row.tokens for row in judged),
        samples=sum(len(row.groups or (0,)) for row in judged),
    )
