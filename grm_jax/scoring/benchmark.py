"""The definition of a benchmark: how its files are read, what is asked, which figures it has.

Dimensions: N records, S verdicts a record, B bootstrap resamples.

    files -> read -> items (records with their place in the benchmark) -> `load`: games, sample
    verdicts -> measures -> values [N, S] -> figures: see `measures` and `figures`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from grm_jax.data.preferences import Preference, require_few_bad
from grm_jax.errors import UserError
from grm_jax.scoring.figures import FigureLike
from grm_jax.scoring.items import (
    BenchmarkRecords,
    Item,
    as_item,
    group_by,
    item_of,
    stratified,
    swapped,
)
from grm_jax.scoring.measures import Measure
from grm_jax.scoring.rules import PAPER, Form, Rules


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the files of a benchmark come from.

    Attributes:
        get: what to download, as a sentence for error messages.
        folders: names that its folder may have inside a folder of several benchmarks.
        hub: the id of the data set on the Hugging Face hub, or "".
        patterns: glob patterns of the files that are read.
    """

    get: str
    folders: tuple[str, ...] = ()
    hub: str = ""
    patterns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: its name on the command line.
        about: one line about it.
        read: (path, skip_bad_rows, form) -> all items; `domain` is the subset or section.
        figures: (records, rules) -> the figures that these records allow, the headline first.
        measures: by name, what its figures average, besides `measures.credit`.
        authors: the rules of its authors.
        paper: the rules of the DeepSeek-GRM paper.
        forms: the forms of question that it supports.
        rating: single responses are rated from 1 to 10 as in the paper, not called right or wrong.
        rankings: its figures rank responses by `measures.score`, for which an unparsable critique
            cannot earn half a credit.
        fixed: rules that have no effect on its headline.
        private: its authors ask that rows are not published as plain text, so reports hold none.
        strata: from coarse to fine, the groups that a sample of `limit` items keeps in proportion.
        cluster: records with the same value (a repeated prompt) are not independent.
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
        """The records in file order; with `order="both"` the two games of every pair.

        Args:
            rules: order and form of the questions; default: the authors' rules.
            limit: the size of a random sample of items, stratified by `strata` (files are grouped
                by subset, so the first rows are not a sample). `.notes` says what was done.
            seed: the seed of that sample.
            skip_bad_rows: leave bad rows out and list them in `.skipped`.
            max_bad_share: raise if more than this share of the items is bad.

        Raises:
            DataError: a missing file, a bad row, or a limit below the number of coarse strata.
            UserError: a form or an order that this benchmark does not have.
        """
        rules = rules or self.authors
        self.check(rules)
        loaded = self.read(Path(path).expanduser(), skip_bad_rows, rules.form)
        records, notes = list(loaded), [*loaded.notes]
        bad, items = len(loaded.skipped) - loaded.tied, len({item_of(record) for record in loaded})
        rows = items + len(loaded.skipped)
        require_few_bad(bad, rows, max_bad_share, loaded.skipped, str(path))
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
        return BenchmarkRecords(records, loaded.skipped, notes)

    def check(self, rules: Rules) -> None:
        """Raise UserError for rules that this benchmark does not support."""
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

    def clusters(self, records: Sequence[Preference]) -> list[Hashable] | None:
        """The cluster of each record for `statistics.bootstrap`; None if all are independent.

        Records of one item are one cluster, and so are records with the same `cluster` value.
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


def missing_note(records: Sequence[Preference], names: Sequence[str]) -> list[str]:
    """A note if some of these domains have no records."""
    missing = [name for name in names if all(record.domain != name for record in records)]
    return [f"no rows of {', '.join(missing)}: not the official figure"] if missing else []
