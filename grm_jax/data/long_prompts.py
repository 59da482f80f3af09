"""Policies for records whose prompts are longer than a model takes.

`error` stops before anything is computed, `skip` leaves the records out, and `truncate-middle` cuts
the middle out of their longest texts. Nothing is cut silently: callers count what was done.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Literal

from grm_jax.critique.prompt import Turn
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError

LongPrompts = Literal["error", "truncate-middle", "skip"]
_GAP = re.compile(r"(?<=\n\[\.\.\. )[\d,]+(?= characters left out \.\.\.\]\n)")
_LEAST = 64  # the number of characters of a text that are always kept


def shorten(record: Preference, excess: Callable[[Preference], int]) -> Preference:
    """The record with the middle cut out of its longest texts (turns and responses) until it fits.

    All texts longer than some number of characters are cut to it; it is the largest number with
    which the prompt fits.

    Args:
        excess: the number of tokens by which a record's prompt exceeds the limit.

    Raises:
        DataError: the prompt does not fit even with the shortest texts.
    """
    texts = [*(turn["content"] for turn in record.turns), *record.responses]
    low, high = _LEAST, max(map(len, texts))
    if (over := excess(_cut(record, low))) > 0:
        raise DataError(
            "prompt",
            f"record {record.id!r} has {over:,} tokens too many even with {_LEAST} characters of "
            "each text",
            "give --long-prompts skip, or a template with fewer words",
            record.source,
        )
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        if excess(_cut(record, middle)) <= 0:
            low = middle
        else:
            high = middle
    return _cut(record, low)


def is_decidable(record: Preference) -> bool:
    """Whether responses with different labels have different texts.

    They may not, if they differed only in the middle that was cut out. The number of characters
    that the cut mentions is ignored.
    """
    texts = [_GAP.sub("", text) for text in record.responses]
    said = zip(texts, record.labels, strict=True)
    return not any(a == b and x != y for (a, x), (b, y) in itertools.combinations(said, 2))


def _cut(record: Preference, most: int) -> Preference:
    turns = tuple(
        Turn(role=turn["role"], content=_middle_out(turn["content"], most)) for turn in record.turns
    )
    return dataclasses.replace(
        record, turns=turns, responses=tuple(_middle_out(text, most) for text in record.responses)
    )


def _middle_out(text: str, most: int) -> str:
    """The text, or its beginning and end with a line between them that says how much is left
    out."""
    if len(text) <= most:
        return text
    head, tail = text[: most - most // 2], text[len(text) - most // 2 :]
    return f"{head}\n[... {len(text) - most:,} characters left out ...]\n{tail}"
