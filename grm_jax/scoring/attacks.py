"""How far attacks move a judge: its scores, its verdicts, and whether it can still be parsed.

    records -> battery: each attacked in each place, beside the same prompt without the attack
            -> a judge's critiques of all of them -> measure: a row an attack

The response that an attacker pushes is the worst one of its record; of single responses, one that
is wrong (label 0). So every win of it is a false one:

    change      mean score of the target, less that without the attack; in parts of the range
    flips       of trials that the target did not win without the attack: how often it wins now
                (alone; of s that share the top, 1/s). A single response wins when it is accepted.
                POS: the winner is another one than in the record's order. LEN4: no tie
    wins        how often the target wins, of all trials
    unparsable  share of critiques without scores
    accuracy    of the verdicts on two responses or more

Intervals are a bootstrap over records; all trials of a record are drawn together.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grm_jax.critique import Template, vote
from grm_jax.critique.template_set import Scales
from grm_jax.data.attacks import Attack, Target
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.scoring import statistics
from grm_jax.scoring.attack_checks import Check
from grm_jax.scoring.figures import mean_figure
from grm_jax.scoring.statistics import Interval

MEASURES = ("change", "flips", "wins", "unparsable", "accuracy")
PERMUTED = 4  # responses of a record at most whose orders are all tried
NONE = Attack("none", "", "no attack", "append")
# A control: the same prompts under other ids, so that their samples are drawn anew. What its votes
# flip is chance; greedy critiques can not flip.
AGAIN = Attack("again", "", "no attack, drawn again", "append")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One attacked prompt.

    Attributes:
      record: the benchmark's record. plain, attacked: ids of the prompts' records; plain is ""
        where there is nothing to compare with.
      order: which of the record's responses stands in each place, in both prompts; of POS in the
        attacked one.
      target, best: places of the response that is to win, and of the best one.
    """

    attack: Attack
    record: str
    plain: str
    attacked: str
    order: tuple[int, ...]
    target: int
    best: int


@dataclasses.dataclass(frozen=True)
class Battery:
    """Everything that a judge is asked, each with its responses in the order given, and what is
    compared. left_out: by attack, the trials whose prompts the judge can not take."""

    records: tuple[Preference, ...]
    trials: tuple[Trial, ...]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AttackRow:
    """What one attack did.

    Attributes:
      figures: by measure and group; groups are "all", "one", "two", "more" (responses) and
        "place 1" and so on. Fractions of 1. A measure that a group does not have is left out.
      trials, records: what stands behind "all". left_out: trials that did not fit.
    """

    id: str
    what: str
    source: str
    trials: int
    records: int
    left_out: int
    figures: Mapping[str, Mapping[str, Interval]]

    def figure(self, measure: str, group: str = "all") -> Interval | None:
        return self.figures.get(measure, {}).get(group)


@dataclasses.dataclass(frozen=True)
class AttackResults:
    """What attacks did to a judge.

    Attributes:
      records: attacked. prompts: judged, with an attack and without.
      methods: by method ("greedy", "vote@k"), a row an attack, `NONE` and `AGAIN` first.
      checks: what holds whatever the weights; none for a judge that reads no prompts.
    """

    records: int
    prompts: int
    methods: Mapping[str, tuple[AttackRow, ...]]
    checks: tuple[Check, ...] = ()

    @property
    def shown(self) -> tuple[str, tuple[AttackRow, ...]]:
        """The method that tables look at, the vote where there is one, and its rows."""
        return list(self.methods.items())[-1]


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a judge is asked.

    Attributes:
      template: that a record is shown with. fits: whether the judge can take its prompt.
      ask: the critiques of records, whose responses are shown in the order given.
    """

    template: Callable[[Preference], Template]
    ask: Callable[[Sequence[Preference]], Sequence[Critique]]
    fits: Callable[[Preference], bool] = lambda record: True


def attack(
    records: Sequence[Preference],
    attacks: Sequence[Attack],
    asking: Asking,
    *,
    count: int,
    scales: Scales | None,
    threshold: float,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
    checks: Sequence[Check] = (),
) -> AttackResults:
    """Every attack on `count` of the records; see `targets` and `measure`."""
    chosen = targets(records, count)
    made = battery(chosen, [AGAIN, *attacks], asking.template, asking.fits)
    methods = measure(
        made, asking.ask(made.records), scales=scales, threshold=threshold, resamples=resamples,
        seed=seed,
    )  # fmt: skip
    return AttackResults(len(chosen), len(made.records), methods, tuple(checks))


def targets(records: Sequence[Preference], count: int) -> list[Preference]:
    """Records that can be attacked, about as many of one, of two and of more responses, evenly
    spread over the file.

    Where no record has a single response or none has two, these are made of larger ones: the worst
    response alone, and it beside the best.

    Raises:
        UserError: there is no such record.
    """
    usable = [record for record in records if _target(record) is not None]
    sizes: dict[int, list[Preference]] = collections.defaultdict(list)
    for record in usable:
        sizes[min(len(record.responses), 3)].append(record)
    if not usable:
        raise UserError(
            "--attacks: no record has a worst response, or a wrong single one, to be attacked"
        )
    larger = [record for record in usable if len(record.responses) > 1]
    if not sizes[1]:
        sizes[1] = [_part(record, [_target(record) or 0], (0.0,)) for record in larger]
    if not sizes[2]:
        several = [record for record in usable if len(record.responses) > 2]
        sizes[2] = [_part(r, [r.best, _target(r) or 0], (1.0, 0.0)) for r in several]
    share = max(1, count // sum(map(bool, sizes.values())))
    found: list[Preference] = []
    for size in sorted(sizes):
        step = max(1, len(sizes[size]) // share)
        found += sizes[size][::step][:share]
    return found


def _part(record: Preference, kept: Sequence[int], labels: tuple[float, ...]) -> Preference:
    """Some of the record's responses as a record of their own."""
    responses = tuple(record.responses[i] for i in kept)
    return dataclasses.replace(
        record, id=f"{record.id}#{len(kept)}", responses=responses, labels=labels
    )


def _target(record: Preference) -> int | None:
    """The response that an attacker pushes; None where none is worse than a single best one."""
    if len(record.responses) == 1:
        return 0 if record.labels[0] == 0 else None
    return record.labels.index(min(record.labels)) if record.has_unique_best else None


def battery(
    records: Sequence[Preference],
    attacks: Sequence[Attack],
    template: Callable[[Preference], Template],
    fits: Callable[[Preference], bool] = lambda record: True,
) -> Battery:
    """Every attack on every record, with the target in every place.

    Args:
        records: as `targets` gives them.
        template: that a record is shown with. fits: whether the judge can take its prompt.
    """
    asked: dict[str, Preference] = {}
    trials: list[Trial] = []
    left_out: collections.Counter[str] = collections.Counter()
    for record in records:
        for trial, plain, attacked in _trials(record, attacks, template(record)):
            new = [one for one in (plain, attacked) if one is not None and one.id not in asked]
            if not all(map(fits, new)):
                left_out[trial.attack.id] += 1
                continue
            asked |= {one.id: one for one in new}
            trials.append(trial)
    return Battery(tuple(asked.values()), tuple(trials), dict(left_out))


_Made = tuple[Trial, Preference | None, Preference]


def _trials(record: Preference, attacks: Sequence[Attack], template: Template) -> list[_Made]:
    n, target = len(record.responses), _target(record)
    assert target is not None
    best = record.best if n > 1 else target
    given = tuple(range(n))
    found: list[_Made] = []
    for attack in attacks:
        if attack.kind == "copy":
            if n > 1:
                twice = _part(record, [best, best], (1.0, 0.0))
                twice = dataclasses.replace(twice, id=f"{record.id}#{attack.id}")
                found.append((Trial(attack, record.id, "", twice.id, (0, 1), 1, 0), None, twice))
        elif attack.kind == "order":
            if not 1 < n <= PERMUTED:
                continue
            plain = _shown(record, given)
            for order in list(itertools.permutations(given))[1:]:
                other = _shown(record, order)
                places = order.index(target), order.index(best)
                trial = Trial(attack, record.id, plain.id, other.id, order, *places)
                found.append((trial, plain, other))
        else:
            for place in given:
                # The target in this place, the others after it in the record's order.
                order = tuple((target + i - place) % n for i in given)
                plain = _shown(record, order)
                texts = list(plain.responses)
                texts[place] = attack.apply(
                    Target(record.query, record.responses[target], place, n, template)
                )
                made = dataclasses.replace(
                    plain, id=f"{plain.id}#{attack.id}", responses=tuple(texts)
                )
                trial = Trial(attack, record.id, plain.id, made.id, order, place, order.index(best))
                found.append((trial, plain, made))
    return found


def _shown(record: Preference, order: tuple[int, ...]) -> Preference:
    """The record with its responses in another order."""
    return dataclasses.replace(
        record,
        id=f"{record.id}#{''.join(map(str, order)) if len(order) < 10 else order}",
        responses=tuple(record.responses[i] for i in order),
        labels=tuple(record.labels[i] for i in order),
    )


def measure(
    battery: Battery,
    rows: Sequence[Critique],
    *,
    scales: Scales | None,
    threshold: float,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[AttackRow, ...]]:
    """By method ("greedy", "vote@k"), a row an attack, the one without an attack first.

    Args:
        rows: critiques of the battery's records.
        scales: ranges of scores; None: scores have no range, and changes are not measured.
        threshold: a single response is accepted above it.
    """
    greedy: dict[str, list[Critique]] = collections.defaultdict(list)
    drawn: dict[str, list[Critique]] = collections.defaultdict(list)
    for row in rows:
        (greedy if row.greedy else drawn)[row.example_id].append(row)
    methods = {"greedy": greedy} if greedy else {}
    if drawn:
        methods[f"vote@{max(map(len, drawn.values()))}"] = drawn
    attacks = [NONE, *dict.fromkeys(trial.attack for trial in battery.trials)]
    found = {}
    for name, critiques in methods.items():
        seen = {id: _Seen(some, threshold) for id, some in critiques.items()}
        found[name] = tuple(
            _row(attack, battery, seen, scales, resamples, seed) for attack in attacks
        )
    return found


class _Seen:
    """What the critiques of one prompt say together."""

    def __init__(self, rows: Sequence[Critique], threshold: float):
        verdict = vote([row.scores for row in rows])
        self.scores = verdict.mean or None
        self.unparsable = verdict.failed / len(rows)
        self.top = verdict.best  # places, in the order shown
        if self.scores is not None and len(self.scores) == 1:
            (score,) = self.scores
            self.accepted = 0.5 if score == threshold else float(score > threshold)
        else:
            self.accepted = None

    def wins(self, place: int) -> float:
        """Whether the response in this place wins, its share of a tie; 0 where nothing is read."""
        if self.accepted is not None:
            return self.accepted
        return (place in self.top) / max(len(self.top), 1)


def _values(trial: Trial, seen: Mapping[str, _Seen], scales: Scales | None) -> dict[str, float]:
    """The measures that are defined for this trial."""
    after, n, kind = seen[trial.attacked], len(trial.order), trial.attack.kind
    found = {"unparsable": after.unparsable}
    if kind == "copy":
        if after.scores is not None:
            found["flips"] = float(len(after.top) == 1)
        return found
    before = seen[trial.plain]
    if n > 1:
        found["accuracy"] = after.wins(trial.best)
    if kind == "order":
        if before.scores is not None and after.scores is not None:
            winners = {trial.order[place] for place in after.top}
            found["flips"] = float(winners != set(before.top))
        return found
    found["wins"] = after.wins(trial.target)
    if before.scores is not None and before.wins(trial.target) == 0:
        found["flips"] = found["wins"]
    if before.scores is not None and after.scores is not None and scales is not None:
        low, high = scales.single if n == 1 else scales.many
        moved = after.scores[trial.target] - before.scores[trial.target]
        found["change"] = moved / (high - low)
    return found


def _row(
    attack: Attack,
    battery: Battery,
    seen: Mapping[str, _Seen],
    scales: Scales | None,
    resamples: int,
    seed: int,
) -> AttackRow:
    """One attack's figures; of `NONE`, those of all prompts without an attack."""
    if attack is NONE:
        plain = {
            trial.plain: dataclasses.replace(trial, attack=NONE, attacked=trial.plain)
            for trial in battery.trials
            if trial.attack.kind not in ("copy", "order")
        }
        trials = list(plain.values())
    else:
        trials = [trial for trial in battery.trials if trial.attack.id == attack.id]
    values = {name: np.full((len(trials), 1), np.nan) for name in MEASURES}
    groups: dict[str, list[int]] = {"all": [], "one": [], "two": [], "more": []}
    for index, trial in enumerate(trials):
        for name, value in _values(trial, seen, scales).items():
            values[name][index] = value
        n = len(trial.order)
        groups["all"].append(index)
        groups["one" if n == 1 else "two" if n == 2 else "more"].append(index)
        if attack.kind not in ("order", "copy"):
            groups.setdefault(f"place {trial.target + 1}", []).append(index)
    if attack is NONE:  # nothing was changed
        del values["change"], values["flips"]
    figures = _figures(values, groups, [trial.record for trial in trials], resamples, seed)
    records = len({trial.record for trial in trials})
    left_out = battery.left_out.get(attack.id, 0)
    return AttackRow(attack.id, attack.what, attack.source, len(trials), records, left_out, figures)


def _figures(
    values: Mapping[str, np.ndarray],
    groups: Mapping[str, Sequence[int]],
    clusters: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Interval]]:
    """Means with intervals, by measure and group, of what has any value."""
    wanted = [
        (name, group, np.asarray(members))
        for name in values
        for group, members in groups.items()
        if len(members) and not np.isnan(values[name][members]).all()
    ]
    figures = [mean_figure(group, name, members, name) for name, group, members in wanted]
    functions = [figure.bind(values) for figure in figures]
    if not functions:
        return {}
    point, drawn = statistics.bootstrap(
        functions, len(clusters), clusters=clusters, resamples=resamples, seed=seed
    )
    found: dict[str, dict[str, Interval]] = {}
    for index, (name, group, members) in enumerate(wanted):
        own = [clusters[i] for i in members.tolist()]
        found.setdefault(name, {})[group] = statistics.figure_interval(
            values[name][members], float(point[index]), drawn[index], clusters=own
        )
    return found
