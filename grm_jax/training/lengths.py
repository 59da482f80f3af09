"""The number of tokens of a record under each prompt that a stage makes of it.

The order in which responses are shown changes a prompt's length by a few tokens, because tokens may
span the boundary between two texts. So near a limit, every order is tried.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from grm_jax.critique import Template
from grm_jax.data.examples import meta_example, reply_example
from grm_jax.data.preferences import Preference
from grm_jax.judge.prompts import Prompts
from grm_jax.training.counts import Counts

_MOST_ORDERS = 120  # orders of the responses that are tried: all of five responses
_MARGIN = 4  # tokens, for each response, by which the lengths of two orders may differ

Tokens = Callable[[Preference, int], int]


@dataclass(frozen=True)
class Reading:
    """One way in which a stage reads a record.

    Attributes:
      what: its name in messages, e.g. "prompt and critique".
      tokens: (record, limit) -> the most tokens over all orders of the responses; far below the
        limit, the tokens of one order. Raises UserError for a record that can not be rendered.
      limit: the most tokens that the stage takes.
      fix: what to do about a longer record, e.g. "raise --length-buckets".
    """

    what: str
    tokens: Tokens
    limit: int
    fix: str

    def excess(self, record: Preference) -> int:
        """The number of tokens beyond the limit; 0 or less for a record that fits."""
        return self.tokens(record, self.limit) - self.limit


class Lengths:
    """The number of tokens of records under each prompt of a run; each prompt is tokenized once.

    Args:
      prompts: the judge's prompts.
      meta: the template of what the meta RM reads before a critique.
      counts: those that are known already; they are kept there.
    """

    def __init__(self, prompts: Prompts, meta: Template, counts: Counts | None = None):
        self._prompts, self._meta_template = prompts, meta
        self.counts = counts or Counts()

    def prompt(self, record: Preference, *, hinted: bool = False) -> int:
        """Tokens of the judge's prompt, with the responses in the record's order."""
        return self._ordered(record, tuple(range(len(record.responses))), hinted)

    def judge(self, record: Preference, limit: int) -> int:
        """Tokens of the judge's prompt, in the longest order."""
        return self._longest(record, limit, hinted=False)

    def hinted(self, record: Preference, limit: int) -> int:
        """Tokens of the judge's prompt with a hint, in the longest order."""
        return self._longest(record, limit, hinted=True)

    def meta(self, record: Preference, limit: int) -> int:
        """Tokens of the meta RM's prompt without a critique, in the longest order."""

        def tokens(order: Sequence[int]) -> int:
            example = meta_example(
                record.turns, [record.responses[i] for i in order], "", self._prompts.tokenizer,
                self._meta_template,
                reference=record.reference, principles=record.principles,
            )  # fmt: skip
            return len(example.prompt)

        return self._most("meta", record, limit, tokens)

    def reply(self, record: Preference, limit: int) -> int:
        """Tokens of the conversation with its longest response."""
        del limit  # there is only one order

        def tokens(_: Sequence[int]) -> int:
            return max(
                reply_example(record.turns, text, self._prompts.tokenizer).length
                for text in record.responses
            )

        return self.counts.get("reply", record, (), tokens)

    def _longest(self, record: Preference, limit: int, *, hinted: bool) -> int:
        kind = "hinted" if hinted else "judge"
        return self._most(
            kind, record, limit, lambda order: self._ordered(record, tuple(order), hinted)
        )

    def _ordered(self, record: Preference, order: tuple[int, ...], hinted: bool) -> int:
        def tokens(order: Sequence[int]) -> int:
            return len(self._prompts.ids(record, order, hinted=hinted))

        return self.counts.get("hinted" if hinted else "judge", record, order, tokens)

    def _most(
        self,
        kind: str,
        record: Preference,
        limit: int,
        tokens: Callable[[Sequence[int]], int],
    ) -> int:
        unshuffled = tuple(range(len(record.responses)))
        count = self.counts.get(kind, record, unshuffled, tokens)
        if count + _MARGIN * len(unshuffled) <= limit:
            return count
        orders = _orders(len(unshuffled))
        return max(self.counts.get(kind, record, order, tokens) for order in orders)


def _orders(n: int) -> Iterable[tuple[int, ...]]:
    """All orders of up to five responses; for more, the record's order and random ones."""
    if math.factorial(n) <= _MOST_ORDERS:
        return itertools.permutations(range(n))
    drawn = random.Random(n)
    return [tuple(range(n)), *(tuple(drawn.sample(range(n), n)) for _ in range(_MOST_ORDERS - 1))]
