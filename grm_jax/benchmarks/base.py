"""What a benchmark is: how its files are read, what is asked, and which figures it has.

Dimensions: N records, S verdicts a record, B bootstrap resamples.

    files -> read -> items (records with their place in the benchmark) -> `load`: games, sample
    verdicts -> measures -> values [N, S] -> figures: see `measures` and `figures`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grm_jax.benchmarks.figures import FigureLike
from grm_jax.benchmarks.rules import PAPER, Form, Rules
from grm_jax.data.preferences import Preference, Records, require_few_bad
from grm_jax.data.rows import DataError
from grm_jax.errors import UserError

if TYPE_CHECKING:
    from grm_jax.benchmarks.measures import Measure


@dataclasses.dataclass(frozen=True)
class Item(Preference):
    """One question to the judge.

    Attributes:
        item: records of one item (the pairs of a list, the games of a pair) belong together: a
            sample of the benchmark and a resample hold all of them or none. "": one by itself.
        place: which of the item's records this is.
    """

    item: str = ""
    place: str = ""


def as_item(record: Preference, item: str = "", place: str = "") -> Item:
    """The record with its place in a benchmark."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(Preference)}
    return Item(**fields, item=item, place=place)


def item_of(record: Preference) -> str:
    """The item that a record belongs to; by itself, its id."""
    return (record.item if isinstance(record, Item) else "") or record.id


SWAPPED = "#swapped"  # ends the id of the second game of a pair


def swapped(record: Item) -> Item:
    """The second game of a pair: its responses in the other order."""
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
    """Records, what was left out (`skipped`), and what a reader must know (`notes`)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a benchmark comes from.

    Attributes:
        get: what to download, in words, for messages.
        folders: names that its folder has inside a folder of several benchmarks.
        hub: data set on the Hugging Face hub, or "".
        patterns: files of it that are read.
    """

    get: str
    folders: tuple[str, ...] = ()
    hub: str = ""
    patterns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line.
        about: one line.
        read: (path, skip_bad_rows, form) -> all its items; `domain` is the subset or section key.
        figures: (records, rules) -> the figures that they allow, the headline first.
        measures: what its figures are means of, by name, beside `measures.credit`.
        authors: the rules of its authors; paper: those of the paper of DeepSeek-GRM.
        forms: the forms of question that it can ask.
        rating: single responses are rated 1-10, as in the paper, not called right or wrong.
        rankings: figures rank by `measures.score`, which has no half credit for what is unreadable.
        fixed: rules that its headline does not look at.
        private: its authors ask that rows are not published as plain text: reports hold none.
        strata: from coarse to fine, what a sample of `limit` items must keep in proportion.
        cluster: records with the same value are not independent (a repeated prompt).
    """

    name: str
    about: str
    read: Callable[[Path, bool, Form], BenchmarkRecords]
    figures: Callable[[Sequence[Preference], Rules], tuple[FigureLike, ...]]
    source: Source = Source("give a preference file")
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    authors: Rules = PAPER
    paper: Rules = PAPER
    forms: tuple[Form, ...] = ("list",)
    rating: bool = False
    rankings: bool = False
    fixed: tuple[str, ...] = ()
    private: bool = False
    strata: tuple[Callable[[Preference], str], ...] = ()
    cluster: Callable[[Preference], Hashable] | None = None

    def load(
        self,
        path: str | Path,
        *,
        rules: Rules | None = None,
        limit: int | None = None,
        seed: int = 0,
        skip_bad_rows: bool = False,
        max_bad_share: float = 1.0,
    ) -> BenchmarkRecords:
        """Its records, in file order; with `order="both"` the two games of every pair.

        Args:
            rules: order and form of the questions; default: the authors'.
            limit: take a sample of so many items, spread over `strata` (files are grouped by
                subset, so the first rows are not a sample). `.notes` says what was done.
            seed: of that sample.
            skip_bad_rows: leave bad rows out and list them in `.skipped`.
            max_bad_share: stop where they are more than this share of the items.

        Raises:
            DataError: a missing file, a bad row, or a limit below the number of coarse strata.
            ValueError: a form or an order that this benchmark does not have.
        """
        rules = rules or self.authors
        self.check(rules)
        found = self.read(Path(path).expanduser(), skip_bad_rows, rules.form)
        records, notes = list(found), [*found.notes]
        bad, items = len(found.skipped) - found.tied, len({item_of(record) for record in found})
        rows = items + len(found.skipped)
        require_few_bad(bad, rows, max_bad_share, found.skipped, str(path))
        if limit is not None:
            members = group_by(records, item_of)
            if limit < len(members):
                firsts = [records[places[0]] for places in members.values()]
                kept = {item_of(r) for r in stratified(firsts, limit, self.strata, seed)}
                note = f"{limit:,} of {len(members):,} items: a random sample (seed {seed})"
                if self.strata:
                    note += ", stratified so that every section is present in proportion"
                records = [record for record in records if item_of(record) in kept]
                notes.append(note)
        if rules.order == "both":
            records = list(self._games(records))
        return BenchmarkRecords(records, found.skipped, notes)

    def check(self, rules: Rules) -> None:
        """ValueError for rules that this benchmark does not have."""
        if rules.form not in self.forms:
            raise UserError(
                f"{self.name} has no form {rules.form!r}; give one of {', '.join(self.forms)}"
            )
        if self.rankings and rules.form == "single" and rules.unparsed in ("half", "chance"):
            raise UserError(
                f"{self.name}: unparsed={rules.unparsed!r} has no meaning in a ranking; give "
                "'wrong' or 'excluded'"
            )

    def _games(self, records: Sequence[Preference]) -> Iterable[Item]:
        for record in records:
            if len(record.responses) != 2:
                raise UserError(
                    f"{self.name}: order 'both' needs pairs, record {record.id!r} has "
                    f"{len(record.responses)} responses; give order 'random' or 'fixed'"
                )
            game = record if isinstance(record, Item) else as_item(record)
            yield dataclasses.replace(game, item=item_of(game))
            yield swapped(game)

    def score(
        self, records: Sequence[Preference], credits: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """Figures of plain credits by group and name, in fractions of 1.

        Args:
            credits: record id -> credit in 0..1, for every record.

        Raises:
            DataError: a record without a credit.
        """
        values = {"credit": credit_vector(records, credits)[:, None]}
        once = np.ones((1, len(records)))
        nested: dict[str, dict[str, float]] = {}
        for figure in self.figures(records, self.authors):
            if figure.measures == ("credit",):
                nested.setdefault(figure.group, {})[figure.name] = float(
                    figure.bind(values)(once)[0]
                )
        return nested

    def clusters(self, records: Sequence[Preference]) -> list[Hashable] | None:
        """The cluster of each record, for `statistics.bootstrap`; None if all are independent.

        Records of one item, and of one prompt where prompts repeat, are one cluster.
        """
        if self.cluster is None and all(item_of(r) == r.id for r in records):
            return None
        parent: dict[Hashable, Hashable] = {}

        def root(name: Hashable) -> Hashable:
            while (above := parent.setdefault(name, name)) != name:
                parent[name] = parent[above]
                name = above
            return name

        for record in records:
            if self.cluster is not None:
                parent[root(("item", item_of(record)))] = root(("prompt", self.cluster(record)))
        return [root(("item", item_of(record))) for record in records]


def credit_vector(records: Sequence[Preference], credits: Mapping[str, float]) -> np.ndarray:
    """Credits [N] in the order of the records. `DataError` names a record without one."""
    try:
        return np.asarray([credits[record.id] for record in records], np.float64)
    except KeyError as error:
        raise DataError(
            "id", f"record {error.args[0]!r} has no credit", "score every record"
        ) from None


def group_by(
    records: Sequence[Preference], key: Callable[[Preference], str]
) -> dict[str, np.ndarray]:
    """Indices of the records by key, keys in order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(key(record), []).append(index)
    return {name: np.asarray(members) for name, members in groups.items()}


def missing_note(records: Sequence[Preference], names: Sequence[str]) -> list[str]:
    """A note where not all of these domains are there."""
    missing = [name for name in names if all(record.domain != name for record in records)]
    return [f"no rows of {', '.join(missing)}: not the official figure"] if missing else []


def prompt_key(record: Preference) -> str:
    """A digest of the conversation: the same for records that repeat a prompt."""
    said = json.dumps([[turn["role"], turn["content"]] for turn in record.turns])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def stratified(
    records: Sequence[Preference],
    limit: int,
    strata: Sequence[Callable[[Preference], str]],
    seed: int,
) -> list[Preference]:
    """`limit` random records, in their order, spread over nested strata in proportion.

    Every coarse stratum gets at least one; a finer one does where the quota around it allows.

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
    # By id, not by place: the draw survives a file that was sorted in another way.
    rng = random.Random(f"{seed} limit")
    places = sorted(range(len(records)), key=lambda place: records[place].id)
    return [records[place] for place in sorted(_draw(records, places, limit, strata, rng))]


def quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` shared out in proportion to `sizes`, at most a group's size, rests to the largest.

    Each group gets at least one if there are enough, else the largest groups get one each.
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
