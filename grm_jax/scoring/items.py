"""Records as items of a benchmark, and random samples stratified by its sections."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grm_jax.data.preferences import Preference, Records
from grm_jax.data.rows import DataError


@dataclasses.dataclass(frozen=True)
class Item(Preference):
    """One question to the judge.

    Attributes:
        item: the id shared by records that belong together (the pairs of a list, the two games of
            a pair): a sample of the benchmark and a bootstrap resample hold all of them or none.
            "" for a record by itself.
        place: which of the item's records this is.
    """

    item: str = ""
    place: str = ""


def as_item(record: Preference, item: str = "", place: str = "") -> Item:
    """The record as an `Item`."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(Preference)}
    return Item(**fields, item=item, place=place)


def item_of(record: Preference) -> str:
    """The id of the item to which a record belongs; the record's own id if it is by itself."""
    return (record.item if isinstance(record, Item) else "") or record.id


SWAPPED = "#swapped"  # ends the id of the second game of a pair


def swapped(record: Item) -> Item:
    """The second game of a pair, with its responses swapped."""
    return dataclasses.replace(
        record,
        id=f"{record.id}{SWAPPED}",
        responses=record.responses[::-1],
        labels=record.labels[::-1],
        item=item_of(record),
    )


def place_of(record: Preference) -> str:
    return record.place if isinstance(record, Item) else ""


class BenchmarkRecords(Records):
    """Records, the rows that were left out (`skipped`), and notes for the results (`notes`)."""


def by_responses(records: Sequence[Preference]) -> list[tuple[int, np.ndarray]]:
    """(n, indices of the records with n responses), n ascending."""
    sizes = np.asarray([len(record.responses) for record in records])
    return [(n, np.flatnonzero(sizes == n)) for n in np.unique(sizes).tolist()]


def group_by(
    records: Sequence[Preference], key: Callable[[Preference], str]
) -> dict[str, np.ndarray]:
    """Key -> indices of the records that have it; keys in order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(key(record), []).append(index)
    return {name: np.asarray(members) for name, members in groups.items()}


def prompt_key(record: Preference) -> str:
    """A digest of the conversation, equal for records with the same prompt."""
    said = json.dumps([[turn["role"], turn["content"]] for turn in record.turns])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def stratified(
    records: Sequence[Preference],
    limit: int,
    strata: Sequence[Callable[[Preference], str]],
    seed: int,
) -> list[Preference]:
    """`limit` random records in their order, in proportion to nested strata.

    Every coarse stratum gets at least one record; a finer stratum does if the quota of its coarser
    stratum allows it.

    Raises:
        DataError: limit < 1, or below the number of coarse strata.
    """
    if limit < 1:
        raise DataError("limit", f"{limit}", "give 1 or more, or leave it out for all records")
    if strata and limit < (needed := len({strata[0](record) for record in records})):
        raise DataError(
            "limit",
            f"{limit} records cannot hold all {needed} sections",
            f"give {needed} or more, or leave it out for all records",
        )
    # Sorted by id, so that the sample does not depend on the order of the file.
    rng = random.Random(f"{seed} limit")
    places = sorted(range(len(records)), key=lambda place: records[place].id)
    return [records[place] for place in sorted(_draw(records, places, limit, strata, rng))]


def quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` among groups in proportion to `sizes`, at most a group's size to each.

    Each group gets at least one if `total` allows it, else the largest groups get one each.
    """
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    share = dict.fromkeys(sizes, 0)
    for name in ranked[:total]:
        share[name] = 1
    everything = sum(sizes.values())
    for _ in range(min(total, everything) - sum(share.values())):
        # The group furthest below its proportion; ties go to the larger one.
        name = max(
            (name for name in ranked if share[name] < sizes[name]),
            key=lambda name: total * sizes[name] / everything - share[name],
        )
        share[name] += 1
    return share


def _draw(
    records: Sequence[Preference],
    places: Sequence[int],
    count: int,
    strata: Sequence[Callable[[Preference], str]],
    rng: random.Random,
) -> list[int]:
    if not strata:
        return rng.sample(places, count)
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(strata[0](records[place]), []).append(place)
    share = quotas({name: len(group) for name, group in groups.items()}, count)
    return [
        place
        for name in sorted(groups)
        for place in _draw(records, groups[name], share[name], strata[1:], rng)
    ]
