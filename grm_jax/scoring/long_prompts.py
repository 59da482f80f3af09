"""A benchmark's records whose prompts are too long for a judge: an error, or cut, or left out.

What was done is said in the notes of the results.
"""

from __future__ import annotations

from collections.abc import Callable

from grm_jax.data.long_prompts import LongPrompts, is_decidable, shorten
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.items import BenchmarkRecords, item_of


def fit(
    records: BenchmarkRecords,
    tokens: Callable[[Preference], int],
    limit: int,
    policy: LongPrompts,
    room: str = "a smaller --max-new-tokens",
) -> BenchmarkRecords:
    """Records whose prompts have at most `limit` tokens.

    Items are left out whole. Where cutting turned responses with different labels into the same
    text, no judge can tell them apart, so their items are left out too.

    Args:
        tokens: the number of tokens of a record's longest prompt, over the orders that are shown.
        limit: the maximum number of tokens.
        policy: see `data.long_prompts`.
        room: what else would allow longer prompts, for the message.

    Raises:
        DataError: a prompt that is too long (error), that cannot be cut enough, or nothing left.
    """
    long = [record for record in records if tokens(record) > limit]
    if not long:
        return records
    first = f"{len(long)} of {len(records)} prompts have more than {limit:,} tokens, the first "
    first += f"{long[0].id!r} with {tokens(long[0]):,}"
    if policy == "error":
        raise DataError(
            "prompt",
            first,
            "give --long-prompts truncate-middle or skip (both are counted), or " + room,
            long[0].source,
        )
    if policy == "skip":
        cut, dropped = {}, {item_of(record) for record in long}
        notes = [f"{len(dropped)} items with prompts longer than {limit:,} tokens were left out"]
    else:
        cut = {record.id: shorten(record, lambda r: tokens(r) - limit) for record in long}
        dropped = {
            item_of(record)
            for record in long
            if is_decidable(record) and not is_decidable(cut[record.id])
        }
        notes = [f"{len(cut)} prompts longer than {limit:,} tokens were cut in the middle"]
        if dropped:
            notes.append(
                f"{len(dropped)} items were left out: their responses differ only in what was cut"
            )
    kept = [cut.get(record.id, record) for record in records if item_of(record) not in dropped]
    if not kept:
        raise DataError("prompt", first, "nothing is left", long[0].source)
    return BenchmarkRecords(kept, records.skipped, (*records.notes, *notes))
