"""Records in, parsed critiques out.

    record -> order of the responses -> prompt -> token ids -> samples -> text -> scores

Samples that show the responses in the same order share one prompt, so its keys and values. Scores
come back in the record's own order of responses.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from grm_jax.critique import Parsed, Template, decided, read, unshuffle
from grm_jax.critique.adaptive import BOUND
from grm_jax.critique.voting import Scores
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.judge.prompts import Prompts
from grm_jax.model.params import Params
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request, Sample
from grm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class AdaptiveK:
    """Stop sampling a record when further samples would hardly change its verdict."""

    bound: float = BOUND
    """Probability of a change of verdict that is accepted; 0: only when none is possible."""
    together: int = 4
    """Most samples of a record that run at once: what may have begun before it is decided."""
    threshold: float | None = None
    """Single responses are decided against it; None: the middle of their template's range."""

    def decided(self, template: Template, scores: Sequence[Scores | None], remaining: int) -> bool:
        """Whether `remaining` further samples would hardly change the verdict of these."""
        low, high = template.scale
        width = high - low
        if any(sample is not None and len(sample) > 1 for sample in scores):
            return decided(scores, remaining, self.bound, span=width)
        middle = (low + high) / 2 if self.threshold is None else self.threshold
        pairs = [None if sample is None else (sample[0], middle) for sample in scores]
        span = max(high - middle, middle - low)
        return decided(pairs, remaining, self.bound, span=span, width=width)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Rollout(Critique):
    """A critique with what was sampled, for training on it.

    Attributes:
      prompt: its token ids.
      ids: [T] int32, the tokens that were drawn, the end token included.
      logprobs: [T] float32, their log-probabilities as they were drawn.
    """

    prompt: tuple[int, ...]
    ids: np.ndarray
    logprobs: np.ndarray

    def plain(self, sample: int) -> Critique:
        """The critique alone, as sample number `sample` (GREEDY: the greedy one)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Critique)}
        return Critique(**{**values, "sample": sample})


class Critic:
    """Draws critiques of records with a sampler."""

    def __init__(self, sampler: Sampler, prompts: Prompts):
        self.sampler, self.prompts = sampler, prompts

    def critiques(
        self,
        params: Params,
        records: Sequence[Preference],
        samples: Sequence[int],
        sampling: SamplingConfig,
        key: jax.Array,
        *,
        hinted: bool = False,
        salt: str = "",
        adaptive: AdaptiveK | None = None,
        progress: Callable[[int], None] | None = None,
        each: Callable[[Rollout], None] | None = None,
    ) -> dict[str, list[Rollout]]:
        """Critiques of every record, by id, in the order of `samples`.

        Args:
          samples: sample indices drawn of each record; they name the randomness.
          key: of the run, stage and step.
          hinted: append the hint that gives the best response away (RFT).
          salt: varies the orders, e.g. with the training step.
          adaptive: leave out samples of records that are decided.
          progress: called with the number of samples that were finished or left out.
          each: called with every critique as it ends, in no particular order.
        """
        by_id = {record.id: record for record in records}
        if len(by_id) != len(records):
            raise ValueError("records have duplicate ids; critiques are told apart by id")
        requests: list[Request] = []
        order_of: dict[tuple[str, int], tuple[int, ...]] = {}
        for record in records:
            # Samples of one order share a prompt. With adaptive k only as far as they run at once,
            # so that whatever is drawn before a record is decided has seen all orders alike.
            groups: dict[tuple[int, tuple[int, ...]], list[int]] = collections.defaultdict(list)
            chosen = self.prompts.orders(record, max(samples) + 1, salt)
            for place, index in enumerate(samples):
                turn = place // adaptive.together if adaptive else 0
                groups[turn, chosen[index]].append(index)
                order_of[record.id, index] = chosen[index]
            for (_, order), members in groups.items():
                prompt = self.prompts.ids(record, order, hinted=hinted)
                requests.append(Request(record.id, prompt, tuple(members)))
        prompts = {(r.example_id, i): r.prompt for r in requests for i in r.samples}
        found: dict[str, dict[int, Rollout]] = collections.defaultdict(dict)

        def wanted(request: Request) -> bool:
            seen = found[request.example_id]
            return adaptive is None or not self._decided(
                by_id[request.example_id], list(seen.values()), len(samples), adaptive
            )

        drawn = self.sampler.sample(
            params,
            requests,
            sampling,
            key,
            wanted=wanted,
            together=adaptive.together if adaptive else None,
        )
        for sample in drawn:
            name = (sample.example_id, sample.index)
            record, order = by_id[sample.example_id], order_of[name]
            text, parsed = read_sample(
                sample, self.prompts.tokenizer, self.prompts.template(record), len(order)
            )
            found[sample.example_id][sample.index] = Rollout(
                example_id=sample.example_id,
                sample=sample.index,
                order=order,
                text=text,
                scores=unshuffle(parsed.scores, order),
                failure=parsed.failure,
                finish_reason=sample.finish_reason,
                prompt=prompts[name],
                tokens=len(sample.tokens),
                ids=sample.tokens,
                logprobs=sample.logprobs,
            )
            if each is not None:
                each(found[sample.example_id][sample.index])
            if progress is not None:
                progress(1)
        result = {
            record.id: [found[record.id][i] for i in samples if i in found[record.id]]
            for record in records
        }
        if progress is not None and adaptive is not None:
            progress(len(records) * len(samples) - sum(map(len, result.values())))
        return result

    def _decided(
        self, record: Preference, critiques: Sequence[Rollout], count: int, rule: AdaptiveK
    ) -> bool:
        """Whether the rest of `count` samples would change the verdict."""
        scores = [critique.scores for critique in critiques]
        return rule.decided(self.prompts.template(record), scores, count - len(critiques))


def written_ids(sample: Sample) -> list[int]:
    """The tokens of a sample's text: without the one that ended it."""
    return sample.tokens[: -1 if sample.finish_reason == "stop" else None].tolist()


def read_sample(
    sample: Sample, tokenizer: Tokenizer, template: Template, n: int
) -> tuple[str, Parsed]:
    """The text of a sample, and what the parser reads in it of n responses, in the order shown."""
    text = tokenizer.decode(written_ids(sample))
    return text, read(template, text, n, truncated=sample.finish_reason != "stop")


def chunks(items: Sequence[Preference], size: int) -> Iterator[Sequence[Preference]]:
    """Consecutive slices of at most `size` items: what is lost when sampling is stopped."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
