"""How long a record is under each prompt that a stage makes of it.

The order in which responses are shown changes a prompt's length by a few tokens: what is joined
over their boundaries depends on the neighbours. So near a limit every order is tried.
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

_MOST_ORDERS = 120  # of the responses that are tried; those of five
_PLAY = 4  # tokens a response by which two orders of the same responses may differ

Tokens = Callable[[Preference, int], int]


@dataclass(frozen=True)
class Reading:
    """One way in which a stage reads a record.

    Attributes:
      what: for messages, e.g. "prompt and critique".
      tokens: (record, limit) -> tokens that it takes, the most over all orders of the responses;
        well below the limit that of one order will do. Raises UserError for a record that can not
        be rendered.
      limit: most tokens.
      fix: what to do about a longer one, e.g. "raise --length-buckets".
    """

    what: str
    tokens: Tokens
    limit: int
    fix: str

    def excess(self, record: Preference) -> int:
        """Tokens beyond the limit; 0 or less where it fits."""
        return self.tokens(record, self.limit) - self.limit


class Lengths:
    """Tokens of records under each prompt of a run; each is counted once.

    Args:
      prompts: the judge's.
      meta: what the meta RM reads before a critique.
    """

    def __init__(self, prompts: Prompts, meta: Template):
        self._prompts, self._meta_template = prompts, meta
        self._known: dict[tuple[str, str, tuple[int, ...]], tuple[Preference, int]] = {}

    def prompt(self, record: Preference, *, hinted: bool = False) -> int:
        """Of the judge's prompt, with the responses as they are given."""
        return self._ordered(record, tuple(range(len(record.responses))), hinted)

    def judge(self, record: Preference, limit: int) -> int:
        """Of the judge's prompt, in the order that takes most."""
        return self._longest(record, limit, hinted=False)

    def hinted(self, record: Preference, limit: int) -> int:
        """Of the judge's prompt with a hint, in the order that takes most."""
        return self._longest(record, limit, hinted=True)

    def meta(self, record: Preference, limit: int) -> int:
        """Of the meta RM's prompt, in the order that takes most, and the end of a critique."""

        def tokens(order: Sequence[int]) -> int:
            example = meta_example(
                record.turns, [record.responses[i] for i in order], "", self._prompts.tokenizer,
                self._meta_template,
                reference=record.reference, principles=record.principles,
            )  # fmt: skip
            return len(example.prompt)

        return self._most("meta", record, limit, tokens)

    def reply(self, record: Preference, limit: int) -> int:
        """Of the conversation with its longest response."""
        del limit  # has no orders
        return max(
            reply_example(record.turns, text, self._prompts.tokenizer).length
            for text in record.responses
        )

    def _longest(self, record: Preference, limit: int, *, hinted: bool) -> int:
        kind = "hinted" if hinted else "judge"
        return self._most(
            kind, record, limit, lambda order: self._ordered(record, tuple(order), hinted)
        )

    def _ordered(self, record: Preference, order: tuple[int, ...], hinted: bool) -> int:
        def tokens(order: Sequence[int]) -> int:
            return len(self._prompts.ids(record, order, hinted=hinted))

        return self._count("hinted" if hinted else "judge", record, order, tokens)

    def _most(
        self,
        kind: str,
        record: Preference,
        limit: int,
        tokens: Callable[[Sequence[int]], int],
    ) -> int:
        unshuffled = tuple(range(len(record.responses)))
        count = self._count(kind, record, unshuffled, tokens)
        if count + _PLAY * len(unshuffled) <= limit:
            return count
        return max(self._count(kind, record, order, tokens) for order in _orders(len(unshuffled)))

    def _count(
        self,
        kind: str,
        record: Preference,
        order: tuple[int, ...],
        tokens: Callable[[Sequence[int]], int],
    ) -> int:
        """Counted once for each record; a copy that was cut has the same id and other texts."""
        known, count = self._known.get((kind, record.id, order), (None, 0))
        if known is record:
            return count
        count = tokens(order)
        self._known[kind, record.id, order] = record, count
        return count


def _orders(n: int) -> Iterable[tuple[int, ...]]:
    """All orders of up to five responses; of more, as many drawn ones and the given one."""
    if math.factorial(n) <= _MOST_ORDERS:
        return itertools.permutations(range(n))
    drawn = random.Random(n)
    return [tuple(range(n)), *(tuple(drawn.sample(range(n), n)) for _ in range(_MOST_ORDERS - 1))]
