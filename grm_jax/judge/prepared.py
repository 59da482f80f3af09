"""A request as the sampler reads it: token ids, and what has come of it so far."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from grm_jax.critique import Template
from grm_jax.data.collate import Example
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.judge import dealt
from grm_jax.judge.base import JudgeModel
from grm_jax.judge.critiques import AdaptiveK
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Judgement, Usage, require_method
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request

_ROUND = AdaptiveK.together  # samples of a request that adaptive sampling draws at once

Ids = tuple[int, ...]


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """What a request that is judged whole and one whose responses are dealt have in common.

    Attributes:
      longest: most tokens of a prompt.
      replies: what the scalar RM reads; () without one.
      rows: critiques so far, by sample.
      asked: how many samples were begun.
    """

    request: JudgeRequest
    template: Template
    sampling: SamplingConfig
    longest: int
    replies: Sequence[Example] = ()
    rows: dict[int, Judgement] = dataclasses.field(default_factory=dict)
    asked: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def begin(self, sample: int) -> Sequence[tuple[int, Ids]]:
        """What the sampler draws for a sample: numbers of critiques, and their prompts."""
        raise NotImplementedError

    @property
    def upcoming(self) -> dict[Ids, list[int]]:
        """The numbers, by prompt, of the critiques that begin next: those of all samples, or of a
        few with adaptive sampling."""
        by_prompt: dict[Ids, list[int]] = collections.defaultdict(list)
        for sample in range(self.asked, self._end_of_round):
            for number, prompt in self.begin(sample):
                by_prompt[prompt].append(number)
        return by_prompt

    def next_round(self) -> dict[Ids, list[int]]:
        """Begin what is `upcoming`."""
        begun = self.upcoming
        self.asked = self._end_of_round
        return begun

    def requests(self, name: str, round: Mapping[Ids, Sequence[int]]) -> list[Request]:
        """A round as the sampler takes it, as requests of this name."""
        seed = f"{self.request.record.id} {self.request.options.seed}"
        return [Request(name, prompt, tuple(of), seed=seed) for prompt, of in round.items()]

    @property
    def _end_of_round(self) -> int:
        k = self.request.options.k
        return k if self.request.options.adaptive is None else min(self.asked + _ROUND, k)

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
    prompts: dict[tuple[int, ...], Ids]

    def begin(self, sample: int) -> list[tuple[int, Ids]]:
        return [(sample, self.prompts[self.orders[sample]])]


@dataclasses.dataclass(kw_only=True)
class Dealt(Prepared):
    """A request whose responses are dealt into groups (`dealt.py`). Its group critiques are
    numbered: sample times the number of groups, plus the place of the group.

    Attributes:
      render: makes the token ids of a record's prompt.
      prompts: token ids by group, of those that were begun or planned for.
      critiques: of groups, by sample and place, of samples that have not ended.
    """

    render: Callable[[Preference], Ids]
    prompts: dict[dealt.Group, Ids] = dataclasses.field(default_factory=dict)
    critiques: dict[int, dict[int, Judgement]] = dataclasses.field(default_factory=dict)

    def begin(self, sample: int) -> list[tuple[int, Ids]]:
        """(number, prompt) of each group of a sample."""
        groups = dealt.deal(self.request, sample)
        for group in groups:
            if group not in self.prompts:
                self.prompts[group] = self.render(dealt.part(self.request.record, group))
        return [
            (sample * len(groups) + place, self.prompts[group])
            for place, group in enumerate(groups)
        ]

    def part(self, number: int) -> Preference:
        """The record that a group critique is about."""
        sample, place = divmod(number, self.request.groups)
        return dealt.part(self.request.record, dealt.deal(self.request, sample)[place])

    def take(self, number: int, critique: Judgement) -> None:
        """Keep a group's critique; the last one of a sample makes it one of all responses."""
        groups = self.request.groups
        sample, place = divmod(number, groups)
        of_sample = self.critiques.setdefault(sample, {})
        of_sample[place] = critique
        if len(of_sample) == groups:
            del self.critiques[sample]
            self.rows[sample] = dealt.join(
                self.request, sample, dealt.deal(self.request, sample),
                [of_sample[place] for place in range(groups)],
            )  # fmt: skip


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
    prepared = _dealt(judge, request) if request.groups > 1 else _whole(judge, request)
    prepared.replies = replies
    limit = judge.model.max_position - prepared.sampling.max_new_tokens
    if prepared.longest > limit:
        raise UserError(
            f"the prompt has {prepared.longest:,} tokens, and {limit:,} leave room for a critique; "
            f"shorten the texts{fewer_at_once(request)}, or allow a critique fewer tokens "
            "(max_new_tokens)"
        )
    return prepared


def fewer_at_once(request: JudgeRequest) -> str:
    """The advice to let a critique read fewer responses, for a message on a long prompt; empty
    where that is not possible."""
    return "" if dealt.size(request) <= 2 else ", let a critique read fewer responses (at_once)"


def _whole(judge: JudgeModel, request: JudgeRequest) -> Whole:
    options, record = request.options, request.record
    prompts = judge.prompts(options)
    orders = prompts.orders(record, options.k)
    by_order = {order: prompts.ids(record, order) for order in dict.fromkeys(orders)}
    return Whole(
        request=request, template=prompts.template(record), sampling=judge.sampling(options),
        longest=max(map(len, by_order.values())), orders=orders, prompts=by_order,
    )  # fmt: skip


def _dealt(judge: JudgeModel, request: JudgeRequest) -> Dealt:
    options, record = request.options, request.record
    if options.order in ("given", "one"):
        raise UserError(
            f"order is {options.order!r} and at_once {options.at_once}: where responses are dealt "
            "into groups, their order is random; leave one of the two out"
        )
    prompts = judge.prompts(options)

    def render(part: Preference) -> Ids:
        return prompts.ids(part, tuple(range(len(part.responses))))

    # Groups are rendered when they begin. None is longer than the longest responses together, but
    # for a token that two texts may share, or not, where they meet.
    size = dealt.size(request)
    lengths = [len(judge.tokenizer.encode(text)) for text in record.responses]
    worst = sorted(range(len(lengths)), key=lengths.__getitem__)[-size:]
    return Dealt(
        request=request, template=prompts.many, sampling=judge.sampling(options),
        longest=len(render(dealt.part(record, tuple(worst)))) + size, render=render,
    )  # fmt: skip


def usage(prepared: Whole | Dealt, judged: Sequence[Judgement]) -> Usage:
    """What the critiques of a request cost."""
    return Usage(
        prompt_tokens=sum(map(len, prepared.prompts.values())),
        sampled_tokens=sum(row.tokens for row in judged),
        samples=sum(len(row.shown) for row in judged),
    )
