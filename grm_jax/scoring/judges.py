"""Judges without a model: baselines to beat, and a test of the whole evaluation.

They write `Critique`s as a model does, so that the same aggregation scores them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from grm_jax.critique.template_set import Scales
from grm_jax.critique.voting import orders
from grm_jax.data.critiques import GREEDY, Critique
from grm_jax.data.preferences import Preference
from grm_jax.errors import UserError

JudgeName = Literal["longer", "random"]
JUDGE_SCALES = Scales((0.0, 1.0), (0.0, 1.0))  # of `random`; `longer` draws no samples
JUDGES = get_args(JudgeName)  # none of them depends on the order in which responses are shown


def judge_rows(
    name: str, records: Sequence[Preference], *, k: int = 32, seed: int = 0, rating: bool = False
) -> list[Critique]:
    """The critiques of a judge for all records.

    longer: one greedy critique for each record, whose scores are the lengths of the responses in
        characters; equal lengths tie. A single response gets 0.5, which is a tie at the usual
        threshold, or with `rating` its length, for figures that rank single responses.
    random: a greedy critique and k samples with uniform scores in 0..1, seeded by `seed` and the
        record's id. Each of n responses wins equally often, and a single response is called
        correct half of the time.

    Raises:
        ValueError: an unknown name, or k < 0.
    """
    if k < 0:
        raise ValueError(f"k is {k}; give 0 or more samples a record")
    if name == "longer":
        return [_longer(record, rating) for record in records]
    if name == "random":
        return [row for record in records for row in _random(record, k, seed)]
    raise UserError(f"unknown judge {name!r}; there are {', '.join(get_args(JudgeName))}")


def _longer(record: Preference, rating: bool) -> Critique:
    lengths = tuple(float(len(response)) for response in record.responses)
    scores = lengths if rating or len(lengths) > 1 else (0.5,)
    return _row(record, GREEDY, scores, range(len(lengths)))


def _random(record: Preference, k: int, seed: int) -> list[Critique]:
    rng = random.Random(f"{seed} random judge {record.id}")
    n = len(record.responses)
    shown = [tuple(range(n)), *orders(n, k, seed=rng.getrandbits(32))]
    return [
        _row(record, sample, tuple(rng.random() for _ in range(n)), order)
        for sample, order in zip(range(GREEDY, k), shown, strict=True)
    ]


def _row(
    record: Preference, sample: int, scores: tuple[float, ...], order: Sequence[int]
) -> Critique:
    return Critique(record.id, sample, tuple(order), scores, None, "stop")
