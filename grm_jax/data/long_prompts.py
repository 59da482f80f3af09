"""Records whose prompts are longer than a model takes: what can be done with them.

`error` stops before anything is computed; `skip` leaves them out; `truncate-middle` takes the
middle out of their longest texts. Nothing is cut silently: whoever calls this counts what was done.
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
_LEAST = 64  # characters of a text that are always kept


def shorten(record: Preference, excess: Callable[[Preference], int]) -> Preference:
    """The record with as much taken out of the middle of its longest texts (turns and responses
    alike) as is needed.

    All texts longer than some number of characters are cut to it; the number is the largest that
    fits.

    Args:
        excess: tokens of a record's prompt beyond the limit; 0 or less where it fits.

    Raises:
        DataError: it does not fit even so.
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
    """Whether no two responses with different labels are the same text, as they are where the
    middle that was taken out held all that they differed in. How much was taken out is no part of
    what a response says."""
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
    """The text, or its beginning and end with a line between that says how much is missing."""
    if len(text) <= most:
        return text
    head, tail = text[: most - most // 2], text[len(text) - most // 2 :]
    return f"{head}\n[... {len(text) - most:,} characters left out ...]\n{tail}"
