r"""The expected score: the mean of the distribution from which a score was drawn.

    ...Scores: \boxed{8, 6}      at the token of the 8, the probabilities of 1..10: 7.6 on average
                      ^

A drawn digit is one sample of that distribution; its mean says more, and two means rarely tie. The
probabilities of the digits are the sampler's, at temperature 1, from logits that it has anyway
("watched" tokens). Other tokens are left out, and the rest is normalised.

Where 10 is two tokens, the probability of the first digit 1 belongs to 1 and to 10. It is split by
the probability of a 0 behind it where a 1 was drawn; else it counts for whichever of both is nearer
to the score that was drawn.

Dimensions: T tokens of a critique, W watched ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from grm_jax.critique import Template, boxes
from grm_jax.errors import UserError
from grm_jax.tokenizer import ChatTokenizer

_WHOLE = re.compile(r"[0-9]+")
_SPACES = " \t▁Ġ"  # how vocabularies write a space before a word


class ScoreTokens:
    """The tokens that scores of 0..10 are written with.

    Attributes:
      ids: [W] token ids: the digits, and 10 where it is one token, with and without a space.
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self._decode = tokenizer.decode
        digits = {str(value) for value in range(11)}
        found = {
            id: word
            for piece, id in tokenizer.vocabulary.items()
            if (word := piece.strip(_SPACES)) in digits and tokenizer.decode([id]).strip() == word
        }
        self.ids = tuple(sorted(found))
        self._column = {id: column for column, id in enumerate(self.ids)}
        self._columns = {
            word: [self._column[id] for id in self.ids if found[id] == word] for word in digits
        }
        if not self._columns["1"]:
            raise UserError(
                "this tokenizer has no tokens for single digits, so that scores have no expected "
                "value; leave `expected` out"
            )

    def require(self, template: Template) -> None:
        """Raise UserError for a template whose scores are not whole numbers from 0 to 10."""
        low, high = template.low, template.high
        if template.reads != "scores" or not (low >= 0 and high <= 10):
            raise UserError(
                f"template {template.name!r} asks for {template.reads} of {low:g} to {high:g}; "
                "expected scores are those of a range within 0 to 10; leave `expected` out"
            )

    def means(
        self,
        ids: Sequence[int],
        text: str,
        scores: Sequence[float],
        watched: np.ndarray,
        template: Template,
    ) -> tuple[float, ...] | None:
        r"""The expected score in each place of the verdict.

        Args:
          ids: [T] tokens of the critique. text: what they say.
          scores: what was read from it, in the order shown.
          watched: [T, W] log-probabilities of `self.ids`.

        None where the places of the scores are not plain: one box a response, decimals, full-width
        digits, or a token that holds more than a digit.
        """
        spans = written_at(text, scores)
        if spans is None:
            return None
        means = []
        for (start, _), score in zip(spans, scores, strict=True):
            at = token_at(self._decode, ids, start)
            if ids[at] not in self._column:
                return None
            probabilities = self._probabilities(watched, at, int(score), template)
            total = sum(probabilities.values())
            means.append(sum(value * p for value, p in probabilities.items()) / total)
        return tuple(means)

    def _probabilities(
        self, watched: np.ndarray, at: int, score: int, template: Template
    ) -> dict[int, float]:
        """The probability of each whole score of the range, not normalised."""
        here = np.exp(watched[at].astype(np.float64))
        mass = {
            value: float(here[self._columns[str(value)]].sum())
            for value in range(11)
            if template.low <= value <= template.high
        }
        if template.high < 10 or self._columns["10"]:
            return mass
        first = mass.get(1, float(here[self._columns["1"]].sum()))
        if score in (1, 10):  # a 1 was drawn, so the place behind it says how it goes on
            zero = float(np.exp(watched[at + 1][self._columns["0"]].astype(np.float64)).sum())
        else:
            zero = float(abs(score - 10) < abs(score - 1))
        mass[10] = first * zero
        if template.low <= 1:
            mass[1] = first * (1 - zero)
        return mass


def token_at(decode: Callable[[Sequence[int]], str], ids: Sequence[int], place: int) -> int:
    """The index of the token that writes the character at `place` of the text of `ids`."""
    low, high = 0, len(ids)  # the text of ids[:low] ends at or before it, of ids[:high] behind
    while high - low > 1:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) <= place:
            low = middle
        else:
            high = middle
    return low


def written_at(text: str, scores: Sequence[float]) -> list[tuple[int, int]] | None:
    """Where each score of the last box begins and ends; None where it is no plain list of whole
    scores."""
    groups = [*boxes.find(text)[0]] or boxes.find_brackets(text)
    for group in reversed(groups):
        numbers = list(_WHOLE.finditer(text, group.start, group.end))
        if [float(number.group()) for number in numbers] == list(scores):
            return [number.span() for number in numbers]
    return None
