"""What judges said of records, as arrays, and what a way of voting makes of it.

Dimensions: R records with as many responses, n responses, K critiques of a record, k critiques of a
vote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from grm_jax.critique.voting import hybrid_scores
from grm_jax.data.critiques import read_critiques
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError
from grm_jax.parallel.mesh import make_mesh
from grm_jax.scoring.aggregate import subsets
from grm_jax.scoring.items import by_responses
from grm_jax.scoring.measures import top
from grm_jax.scoring.scalar_rm import ScalarScorer


@dataclasses.dataclass(frozen=True)
class Group:
    """Records with n responses, and what was said of them.

    Attributes:
      records: R of them.
      best: [R] the index of each one's best response.
      scores: [R, K, n], NaN where a critique has no scores.
      meta: [R, K] scores of the meta RM; zeros without one.
      scalar: [R, n] scores of the scalar RM; zeros without one.
    """

    records: tuple[Preference, ...]
    best: np.ndarray
    scores: np.ndarray
    meta: np.ndarray
    scalar: np.ndarray

    @property
    def responses(self) -> int:
        """n, the number of responses."""
        return self.scores.shape[2]

    def take(self, chosen: Sequence[int]) -> Group:
        """Some of the records."""
        index = np.asarray(chosen)
        records = tuple(self.records[i] for i in chosen)
        return Group(
            records, self.best[index], self.scores[index], self.meta[index], self.scalar[index]
        )

    @property
    def usable(self) -> np.ndarray:
        """[R, K] whether a critique has scores."""
        return ~np.isnan(self.scores[..., 0])

    @property
    def top(self) -> np.ndarray:
        """[R, K, n] which responses have a critique's top score; none without scores."""
        return top(self.scores)

    @property
    def tied(self) -> np.ndarray:
        """[R, K] whether a critique's top score is shared."""
        return self.top.sum(axis=2) > 1

    @property
    def right(self) -> np.ndarray:
        """[R, K] whether the best response alone has the top score."""
        has = np.take_along_axis(self.top, self.best[:, None, None], axis=2)[..., 0]
        return has & ~self.tied


Judged = Sequence[Group]
Method = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(scores [R, k, n] with NaN, meta [R, k], scalar [R, n]) -> values [R, n]."""


def grouped(
    records: Sequence[Preference],
    scores: Mapping[str, np.ndarray],
    meta: Mapping[str, np.ndarray] | None = None,
    scalar: Mapping[str, Sequence[float]] | None = None,
) -> list[Group]:
    """Scores [K, n], meta scores [K] and scalar scores [n] by record id -> groups."""
    found = []
    for n, members in by_responses(records):
        chosen = [records[i] for i in members.tolist()]
        drawn = np.stack([scores[r.id] for r in chosen])
        found.append(
            Group(
                tuple(chosen),
                np.asarray([int(np.argmax(r.labels)) for r in chosen]),
                drawn,
                np.zeros(drawn.shape[:2]) if meta is None
                else np.stack([meta[r.id] for r in chosen]),
                np.zeros((len(chosen), n)) if scalar is None
                else np.asarray([scalar[r.id] for r in chosen], float),
            )
        )  # fmt: skip
    return found


def read_samples(
    records: Sequence[Preference], file: Path, scalar: Mapping[str, Sequence[float]] | None, k: int
) -> list[Group]:
    """The first k critiques of each record in a samples file. Raises UserError where some miss, or
    where the meta RM has scored some readable critiques and not all."""
    scores = {r.id: np.full((k, len(r.responses)), np.nan) for r in records}
    meta = {r.id: np.zeros(k) for r in records}
    seen = dict.fromkeys(scores, 0)
    judged: dict[bool, str] = {}  # whether the meta RM has scored it -> one such critique
    for row in read_critiques(file):
        if row.example_id in scores and 0 <= row.sample < k:
            seen[row.example_id] += 1
            if row.scores is not None:
                scores[row.example_id][row.sample] = row.scores
                judged[row.meta is not None] = f"sample {row.sample} of {row.example_id!r}"
                meta[row.example_id][row.sample] = 0.0 if row.meta is None else row.meta
    if missing := [id for id, count in seen.items() if count < k]:
        raise UserError(
            f"{file} has fewer than {k} critiques of {missing[0]!r}: it is of other records, or of "
            "a smaller --k; give another --runs, or that --k"
        )
    if len(judged) > 1:
        raise UserError(
            f"{file}: the meta RM has scored {judged[True]} and not {judged[False]}; delete the "
            "folder of this file, and run the claim again"
        )
    return grouped(records, scores, meta, scalar)


def read_verdicts(records: Sequence[Preference], file: Path) -> tuple[Judged, Judged]:
    """The critiques of what `python -m grm_jax.judge --expected` wrote, by their drawn and by their
    expected scores; rows of other records are left out."""
    sizes = {record.id: len(record.responses) for record in records}
    drawn: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] not in sizes:
            continue
        critiques, missing = row["verdict"]["critiques"], [np.nan] * sizes[row["id"]]
        drawn[row["id"]] = np.asarray([c["scores"] or missing for c in critiques])
        expected[row["id"]] = np.asarray(
            [(c["expected"] or c["scores"]) if c["scores"] else missing for c in critiques]
        )
    chosen = [record for record in records if record.id in drawn]
    return grouped(chosen, drawn), grouped(chosen, expected)


def scalar_scores(run: Path, records: Sequence[Preference]) -> Mapping[str, Sequence[float]]:
    """The scores of a run's scalar RM by record id. They are computed once for the same weights and
    texts, and kept in the run's directory."""
    scorer = ScalarScorer(
        run, cache=run / "judged" / "cache", mesh=make_mesh(), compute_dtype="auto",
        score_tokens=4096,
    )  # fmt: skip
    return scorer.scores("scalar RM", records).scores


def scalar_credits(run: Path, records: Sequence[Preference]) -> np.ndarray:
    """The credit of each record by a run's scalar RM alone, group after group."""
    scores = scalar_scores(run, records)
    judged = grouped(records, {r.id: np.asarray([scores[r.id]]) for r in records})
    return accuracy(judged, 1, plain)


def by_record(judged: Judged, values: Callable[[Group], np.ndarray]) -> np.ndarray:
    """A value of each record, group after group."""
    return np.concatenate([values(group) for group in judged])


def of_domain(judged: Judged, domain: str) -> list[Group]:
    """The records of one domain."""
    kept = []
    for group in judged:
        chosen = [i for i, record in enumerate(group.records) if record.domain == domain]
        if chosen:
            kept.append(group.take(chosen))
    return kept


def chance(judged: Judged) -> float:
    """The accuracy of a guess among the responses, in percent."""
    return 100.0 * float(np.mean(guesses(judged)))


def guesses(judged: Judged) -> np.ndarray:
    """The credit that a guess among the responses earns for each record, group after group."""
    return by_record(judged, lambda group: np.full(len(group.records), 1.0 / group.responses))


def accuracy(judged: Judged, k: int, method: Method) -> np.ndarray:
    """The mean credit of each record's votes of k critiques, group after group. A vote without a
    readable critique is wrong."""

    def credits(group: Group) -> np.ndarray:
        votes = []
        for chosen in subsets(group.scores.shape[1], k, group.scores.shape[2]):
            values = method(group.scores[:, chosen], group.meta[:, chosen], group.scalar)
            some = group.usable[:, chosen].any(axis=1)
            votes.append(np.where(some, credit(values, group.best), 0.0))
        return np.mean(votes, axis=0)

    return by_record(judged, credits)


def credits(
    seeds: Sequence[Judged], ks: Sequence[int], method: Method | None = None
) -> dict[int, list[np.ndarray]]:
    """`accuracy` of votes of each k, seed after seed. `method`: plain votes by default."""
    return {k: [accuracy(judged, k, method or plain) for judged in seeds] for k in ks}


def scalar_accuracy(judged: Judged) -> np.ndarray:
    """The credit of each record by the scalar RM alone, group after group."""
    return by_record(judged, lambda group: credit(group.scalar, group.best))


def credit(values: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Values [R, n] -> [R]: 1 over the number of responses with the largest value, if the best one
    is among them."""
    leading = top(np.round(values, 9))
    return np.take_along_axis(leading, best[:, None], axis=1)[:, 0] / leading.sum(axis=1)


def plain(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """Eq. (14)."""
    return np.nansum(scores, axis=1)


def guided(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """The half that the meta RM ranks highest votes."""
    return keeping(max(1, meta.shape[1] // 2))(scores, meta, scalar)


def keeping(kept: int) -> Method:
    """The `kept` critiques (k_meta) that the meta RM ranks highest vote."""

    def method(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
        order = np.where(np.isnan(scores[..., 0]), np.inf, -meta)
        best = np.argsort(order, axis=1, kind="stable")[:, :kept]
        return np.nansum(np.take_along_axis(scores, best[..., None], axis=1), axis=1)

    return method


def weighted(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """Each critique counts as probably as the meta RM calls it correct."""
    return np.nansum(_sigmoid(meta)[..., None] * scores, axis=1)


def scalar_weighted(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """The scalar RM as the meta RM: a critique counts as probably as its winner beats the best of
    the others by the scalar scores (Bradley-Terry, at half of the margin)."""
    return weighted(scores, 0.5 * margin(scores, scalar), scalar)


def margin(scores: np.ndarray, scalar: np.ndarray) -> np.ndarray:
    """[R, k] the scalar score of each critique's winner less the best one of the others; of tied
    winners their mean; 0 where all responses tie, and without scores."""
    leading = top(scores)
    count = leading.sum(axis=2)
    winner = np.where(leading, scalar[:, None], 0.0).sum(axis=2) / np.maximum(count, 1)
    others = np.where(leading, -np.inf, scalar[:, None]).max(axis=2)
    between = (count > 0) & (count < scores.shape[2])
    return np.where(between, winner - np.where(between, others, 0.0), 0.0)


def hybrid(weight: float) -> Method:
    """The mean vote plus `weight` times the scalar score, both centred over the responses."""

    def method(scores: np.ndarray, meta: np.ndarray, scalar: np.ndarray) -> np.ndarray:
        read = np.maximum((~np.isnan(scores[..., 0])).sum(axis=1), 1)
        mean = np.nansum(scores, axis=1) / read[:, None]
        return np.stack(hybrid_scores(list(mean.T), list(scalar.T), weight), axis=1)

    return method


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))
