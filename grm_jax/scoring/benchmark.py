"""What a benchmark is: how its files are read, what is asked, and which figures it has.

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


def missing_note(records: Sequence[Preference], names: Sequence[str]) -> list[str]:
    """A note where not all of these domains are there."""
    missing = [name for name in names if all(record.domain != name for record in records)]
    return [f"no rows of {', '.join(missing)}: not the official figure"] if missing else []
