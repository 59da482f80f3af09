"""Requests in at any time, verdicts out as they end: the open-ended use of a judge.

    JudgeRequest -> prompts (one an order of the responses) -> sampler's session -> critiques
                 -> (meta RM, scalar RM, for what has ended) -> decide -> Verdict

One session batches all that it is given: requests of many clients, of any size and with settings of
their own, chats, scalar scores, and probabilities of labels. Between two chunks of decoding, new
ones begin in free lanes. The randomness of a sample is keyed by its request's texts, seed and
number, and programs keep their shapes whatever runs beside it: the same request gets the same
critiques.

A session is used from one thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence

import jax

from grm_jax.critique import Turn, unshuffle
from grm_jax.data.collate import Example
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.judge.base import JudgeModel
from grm_jax.judge.critiques import read_sample, written_ids
from grm_jax.judge.expected import ScoreTokens
from grm_jax.judge.labels import LabelRow
from grm_jax.judge.prepared import Dealt, Whole, fewer_at_once, prepare, usage
from grm_jax.judge.request import JudgeRequest, LabelRequest
from grm_jax.judge.verdict import (
    Completion,
    Judgement,
    LabelLogprobs,
    ScalarScores,
    Verdict,
    decide,
)
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.plan import Plan
from grm_jax.sampler.schedule import Request, Sample

Result = Verdict | tuple[Completion, ...] | ScalarScores | LabelLogprobs
_SHORT = Example((0,), ())  # a row of one token


@dataclasses.dataclass
class _Chat:
    """A conversation that the model goes on with."""

    prompt: tuple[int, ...]
    count: int
    said: dict[int, Completion] = dataclasses.field(default_factory=dict)


class JudgeSession:
    """An open-ended session of a judge.

    Args:
      longest_prompt: most tokens of a prompt.
      max_new_tokens: most tokens of a critique or a reply.
      samples: how many are drawn at once at most, for requests that are not known yet.
      plan: of the sampler, for requests that are known (`Sampler.plan`), in place of `samples`.
      expected: whether verdicts can have expected scores; some of the sampler's speed is its price.

    Raises UserError where one sample needs more memory than there is, and for `expected` scores of
    a template whose scores are not whole numbers up to ten.
    """

    def __init__(
        self,
        judge: JudgeModel,
        *,
        longest_prompt: int,
        max_new_tokens: int,
        samples: int = 0,
        plan: Plan | None = None,
        expected: bool = False,
    ):
        self.judge = judge
        self.longest_prompt, self.max_new_tokens = longest_prompt, max_new_tokens
        self.expected = ScoreTokens(judge.tokenizer) if expected else None
        self._tickets = itertools.count()
        self._open: dict[int, Whole | Dealt | _Chat] = {}
        self._replies: dict[int, list[Example]] = {}
        self._labels: dict[int, list[LabelRow]] = {}
        judge.load_reward_models()  # before caches are planned, which get what is free
        key = jax.random.key(0)  # constant: `Request.seed` holds the request's texts and seed
        watch = () if self.expected is None else self.expected.ids
        if plan is not None:
            self._session = judge.sampler.open_planned(judge.params, plan, key=key, watch=watch)
        else:
            self._session = judge.sampler.open(
                judge.params, longest_prompt=longest_prompt, max_new_tokens=max_new_tokens,
                samples=samples, key=key, watch=watch, repeatable=True,
            )  # fmt: skip
        self.plan = self._session.plan

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self._open or self._replies or self._labels)

    def warm_up(self) -> None:
        """Compile the programs that requests need, instead of while the first ones wait.

        Nothing is sampled, and no verdict changes. Of the meta RM and the scalar RM it compiles the
        program for their shortest rows; those for longer rows come with the first such row.
        """
        self._session.warm_up()
        mesh, tokens = self.judge.mesh, self.judge.sampler.engine.prefill_tokens
        if self.judge.guided:
            self.judge.meta.logits([_SHORT], mesh, tokens)
        if self.judge.has_scalar:
            self.judge.scalar.logits([_SHORT], mesh, tokens)

    def add(self, request: JudgeRequest | Whole | Dealt) -> int:
        """Begin a request; its verdict comes out of `step` under the ticket returned.

        Raises UserError at once for a request that can not be judged.
        """
        prepared = prepare(self.judge, request) if isinstance(request, JudgeRequest) else request
        options = prepared.request.options
        if options.expected and self.expected is None:
            raise UserError("expected scores were asked for, and this session does not watch them")
        if options.expected and self.expected is not None:
            self.expected.require(prepared.template)
        self._require_room(
            prepared.longest, prepared.sampling.max_new_tokens, fewer_at_once(prepared.request)
        )
        ticket = next(self._tickets)
        self._open[ticket] = prepared
        self._begin(ticket, prepared)
        return ticket

    def add_chat(
        self, messages: Sequence[Turn], sampling: SamplingConfig, n: int = 1, seed: int = 0
    ) -> int:
        """Begin n replies of the model to a chat; a tuple of `Completion` comes out of `step`."""
        prompt = tuple(self.judge.tokenizer.chat(messages))
        self._require_room(len(prompt), sampling.max_new_tokens)
        ticket = next(self._tickets)
        self._open[ticket] = _Chat(prompt, n)
        content = f"chat {seed} {' '.join(map(str, prompt))}"
        self._session.add(Request(str(ticket), prompt, tuple(range(n)), seed=content), sampling)
        return ticket

    def add_scalar(self, turns: Sequence[Turn], responses: Sequence[str]) -> int:
        """Begin the scalar RM's scores of responses; a `ScalarScores` comes out of `step`."""
        if not self.judge.has_scalar:
            raise UserError("this judge has no scalar RM; load it with one (scalar=..., --scalar)")
        rows = self.judge.scalar.examples(turns, responses)
        ticket = next(self._tickets)
        self._replies[ticket] = rows
        return ticket

    def add_labels(self, asked: LabelRequest) -> int:
        """Begin reading the probabilities of labels; a `LabelLogprobs` comes out of `step`."""
        rows = self.judge.labels.rows(asked)
        self._require_room(max(row.length for row in rows), 0)
        ticket = next(self._tickets)
        self._labels[ticket] = rows
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request; what it has begun stops before the next chunk."""
        self._replies.pop(ticket, None)
        self._labels.pop(ticket, None)
        if self._open.pop(ticket, None) is not None:
            self._session.cancel(str(ticket))

    def finished(self, ticket: int) -> int:
        """How many samples of a request that runs have ended."""
        entry = self._open.get(ticket)
        if entry is None:
            return 0
        return len(entry.said if isinstance(entry, _Chat) else entry.rows)

    def step(self) -> list[tuple[int, Result]]:
        """A bounded piece of work: admit what fits, decode one chunk; what has ended with it."""
        results: list[tuple[int, Result]] = [*self._score_replies(), *self._read_labels()]
        if self._session.idle:
            return results
        touched: dict[int, Whole | Dealt] = {}
        groups: list[tuple[Dealt, int, Preference, Judgement]] = []
        for sample in self._session.step():
            ticket = int(sample.example_id)
            entry = self._open.get(ticket)
            if isinstance(entry, _Chat):
                entry.said[sample.index] = self._completion(entry, sample)
                if len(entry.said) == entry.count:
                    del self._open[ticket]
                    results.append((ticket, tuple(entry.said[i] for i in range(entry.count))))
            elif isinstance(entry, Whole):
                order = entry.orders[sample.index]
                entry.rows[sample.index] = self._judgement(entry, sample, order)
                touched[ticket] = entry
            elif entry is not None:
                part = entry.part(sample.index)
                row = self._judgement(entry, sample, tuple(range(len(part.responses))))
                groups.append((entry, sample.index, part, row))
                touched[ticket] = entry
        read = self._with_meta([(part, row) for *_, part, row in groups])
        for (entry, number, *_), row in zip(groups, read, strict=True):
            entry.take(number, row)
        ended = []
        for ticket, entry in touched.items():
            if entry.ended:
                ended.append(ticket)
            elif len(entry.rows) == entry.asked:
                self._begin(ticket, entry)
        return results + self._verdicts(ended)

    def _require_room(self, prompt_tokens: int, new_tokens: int, advice: str = "") -> None:
        if prompt_tokens > self.longest_prompt:
            raise UserError(
                f"the prompt has {prompt_tokens:,} tokens, and at most {self.longest_prompt:,} are "
                f"read; shorten the texts{advice}, or allow longer prompts (--max-prompt-tokens)"
            )
        if new_tokens > self.max_new_tokens:
            raise UserError(
                f"max_new_tokens is {new_tokens:,}, and at most {self.max_new_tokens:,} are "
                "written; ask for fewer, or allow more (--max-new-tokens)"
            )

    def _begin(self, ticket: int, entry: Whole | Dealt) -> None:
        """Give the sampler the next round of samples."""
        for request in entry.requests(str(ticket), entry.next_round()):
            self._session.add(request, entry.sampling)

    def _judgement(self, entry: Whole | Dealt, sample: Sample, order: tuple[int, ...]) -> Judgement:
        text, parsed = read_sample(sample, self.judge.tokenizer, entry.template, len(order))
        expected = None
        if self.expected is not None and parsed.scores is not None and sample.watched is not None:
            means = self.expected.means(
                written_ids(sample), text, parsed.scores, sample.watched, entry.template
            )
            expected = unshuffle(means, order)
        return Judgement(
            example_id=entry.request.record.id,
            sample=sample.index,
            order=order,
            scores=unshuffle(parsed.scores, order),
            failure=parsed.failure,
            finish_reason=sample.finish_reason,
            text=text,
            tokens=len(sample.tokens),
            principles=parsed.principles,
            expected=expected,
        )

    def _completion(self, entry: _Chat, sample: Sample) -> Completion:
        return Completion(
            text=self.judge.tokenizer.decode(written_ids(sample)),
            tokens=tuple(sample.tokens.tolist()),
            logprobs=tuple(sample.logprobs.tolist()),
            finish_reason=sample.finish_reason,
            prompt_tokens=len(entry.prompt),
        )

    def _score_replies(self) -> list[tuple[int, ScalarScores]]:
        entries, self._replies = self._replies, {}
        if not entries:
            return []
        scores = self._scalar_scores(list(entries.values()))
        return [
            (ticket, ScalarScores(values, sum(row.length for row in rows)))
            for (ticket, rows), values in zip(entries.items(), scores, strict=True)
        ]

    def _read_labels(self) -> list[tuple[int, LabelLogprobs]]:
        entries, self._labels = self._labels, {}
        if not entries:
            return []
        found = iter(self.judge.labels.logprobs([row for rows in entries.values() for row in rows]))
        return [
            (ticket, LabelLogprobs(
                tuple(itertools.islice(found, len(rows))), sum(row.length for row in rows)
            ))
            for ticket, rows in entries.items()
        ]  # fmt: skip

    def _scalar_scores(self, asked: Sequence[Sequence[Example]]) -> list[tuple[float, ...]]:
        """The scores of the rows of each of several requests, all in one batch."""
        judge, rows = self.judge, [row for rows in asked for row in rows]
        tokens = judge.sampler.engine.prefill_tokens
        scores = iter(judge.scalar.logits(rows, judge.mesh, tokens))
        return [tuple(itertools.islice(scores, len(rows))) for rows in asked]

    def _verdicts(self, tickets: Sequence[int]) -> list[tuple[int, Result]]:
        """The verdicts of requests whose critiques are all there."""
        popped = [self._open.pop(ticket) for ticket in tickets]
        entries = [entry for entry in popped if isinstance(entry, Whole | Dealt)]
        rows = [[entry.rows[index] for index in sorted(entry.rows)] for entry in entries]
        flat = iter(
            self._with_meta(
                [
                    (entry.request.record, row)
                    for entry, judged in zip(entries, rows, strict=True)
                    for row in judged
                ]
            )
        )
        rows = [list(itertools.islice(flat, len(judged))) for judged in rows]
        scalars: Sequence[tuple[float, ...] | None] = [None] * len(entries)
        if self.judge.has_scalar and entries:
            scalars = self._scalar_scores([entry.replies for entry in entries])
        now = time.perf_counter()
        results: list[tuple[int, Result]] = []
        for ticket, entry, judged, scalar in zip(tickets, entries, rows, scalars, strict=True):
            verdict = decide(
                entry.request, judged, scale=entry.template.scale, guided=self.judge.guided,
                scalar=scalar, usage=usage(entry, judged), judge=self.judge.fingerprint,
                seconds=now - entry.started,
            )  # fmt: skip
            results.append((ticket, verdict))
        return results

    def _with_meta(self, judged: Sequence[tuple[Preference, Judgement]]) -> list[Judgement]:
        """Critiques with the meta RM's logits, if there is one, all in one batch. Those that were
        joined have theirs from their groups.

        One that the meta RM can not read whole, since its own prompt is longer, has failed.
        """
        rows = [row for _, row in judged]
        if not self.judge.guided:
            return rows
        meta, places, examples = self.judge.meta, [], []
        for i, (record, row) in enumerate(judged):
            if row.scores is None or row.groups is not None:
                continue
            example = meta.example(record, row, self.judge.tokenizer)
            if example.length > meta.longest:
                rows[i] = dataclasses.replace(
                    row, scores=None, expected=None, failure="meta_length"
                )
                continue
            places.append(i)
            examples.append(example)
        if examples:
            tokens = self.judge.sampler.engine.prefill_tokens
            logits = meta.logits(examples, self.judge.mesh, tokens)
            for i, logit in zip(places, logits, strict=True):
                rows[i] = dataclasses.replace(rows[i], meta=logit)
        return rows
