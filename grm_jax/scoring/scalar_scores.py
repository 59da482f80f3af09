"""A scalar RM's scores of a benchmark, its verdicts, and votes plus its scores.

    scalar.json     {"weights": digest, "threshold": number or null, "scores": {record id: [..]}}

The file lies beside samples.jsonl, so that the rows `scalar` and `hybrid@k` are computed again
without the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grm_jax import files
from grm_jax.critique.voting import hybrid_scores
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, show
from grm_jax.files import written_whole
from grm_jax.scoring.items import by_responses
from grm_jax.scoring.measures import Votes

FILE = "scalar.json"


@dataclasses.dataclass(frozen=True)
class ScalarScores:
    """What a scalar RM says of the records of a benchmark.

    Attributes:
        scores: record id -> the score of each response; a higher one is better.
        threshold: a single response with a higher score counts as correct; None: not known.
        weights: the digest of the model's files.
    """

    scores: Mapping[str, tuple[float, ...]]
    threshold: float | None
    weights: str

    def options(self) -> dict[str, Any]:
        """The options of `aggregate.aggregate` that these scores are."""
        return {"scalar": self.scores, "scalar_threshold": self.threshold}


def write_scalar_scores(path: str | Path, found: ScalarScores) -> None:
    """Write scalar.json; the file appears whole or not at all."""
    text = json.dumps(
        {"weights": found.weights, "threshold": found.threshold, "scores": dict(found.scores)},
        ensure_ascii=False, allow_nan=False,
    )  # fmt: skip
    with written_whole(Path(path)) as partial:
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_scalar_scores(path: str | Path) -> ScalarScores:
    """Read a scalar.json. Raises UserError for one that is missing, and DataError naming the file
    and the field for one that is of another kind."""
    values = files.read_json(path)
    threshold, scores, weights = (values.get(n) for n in ("threshold", "scores", "weights"))
    fix, where = "evaluate with --scalar again", str(path)
    if threshold is not None and not is_number(threshold):
        raise DataError("threshold", show(threshold), fix, where)
    if not isinstance(weights, str):
        raise DataError("weights", show(weights), fix, where)
    if not isinstance(scores, dict):
        raise DataError("scores", show(scores), fix, where)
    for id, row in scores.items():
        if not isinstance(row, list) or not all(map(is_number, row)):
            raise DataError(f"scores[{id!r}]", show(row), fix, where)
    return ScalarScores({id: tuple(row) for id, row in scores.items()}, threshold, weights)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def scalar_votes(records: Sequence[Preference], scores: Mapping[str, Sequence[float]]) -> Votes:
    """The scores as one verdict a record.

    Raises:
        DataError: a record without scores, or with other than one finite number a response.
    """
    missing = [record.id for record in records if record.id not in scores]
    if missing:
        raise DataError(
            "scalar",
            f"{len(missing)} of {len(records)} records have no scores of the scalar RM, the first "
            f"is {missing[0]!r}",
            "score all records, with the same data (and --limit and --seed)",
        )
    for record in records:
        found, n = scores[record.id], len(record.responses)
        if len(found) != n or not np.isfinite(found).all():
            raise DataError(
                "scalar",
                f"the scores of {record.id!r} are {tuple(found)}, it has {n} responses",
                "give one finite number a response",
            )
    return Votes(
        tuple(
            (members, np.asarray([[scores[records[i].id]] for i in members.tolist()], float))
            for _, members in by_responses(records)
        ),
        1,
    )


def add_scalar(votes: Votes, scalar: Votes, weight: float) -> Votes:
    """Votes plus scalar scores (`voting.hybrid_scores`); single responses keep their mean votes.

    Args:
        scalar: the `scalar_votes` of the same records.
    """
    groups = []
    for (members, means), (_, scores) in zip(votes.groups, scalar.groups, strict=True):
        n = means.shape[2]
        if n > 1:
            columns = [means[..., i] for i in range(n)], [scores[..., i] for i in range(n)]
            means = np.round(np.stack(hybrid_scores(*columns, weight), axis=-1), 9)
        groups.append((members, means))
    return Votes(tuple(groups), votes.count)
