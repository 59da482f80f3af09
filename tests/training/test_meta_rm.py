"""What the meta RM learns from, and how it is measured."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from grm_jax.critique import is_correct
from grm_jax.data.collate import Example
from grm_jax.data.trajectories import Trajectory
from grm_jax.training import meta_rm
from grm_jax.training.options import MetaRM

LABELS = {2: (1.0, 0.0), 3: (0.0, 1.0, 0.0), 1: (1.0,)}


def critique(item: str, *scores: float) -> Trajectory:
    labels = LABELS[len(scores)]
    return Trajectory(
        example_id=item, sample=0, order=tuple(range(len(scores))), scores=scores, failure=None,
        finish_reason="stop", text="", query="q", responses=("a", "b", "c")[: len(scores)],
        labels=labels, correct=is_correct(scores, labels, threshold=5.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "paper", "expected"),
    [
        ((7, 3), 1.0, 1.0),
        ((3, 7), 0.0, 0.0),
        ((7, 7), 0.0, 0.5),
        ((7, 7, 7), 0.0, 1 / 3),
        ((7, 3, 7), 0.0, 0.0),  # the best response does not share the top score
        ((8,), 1.0, 1.0),
        ((5,), 0.0, 0.5),
    ],
)
def test_labels_of_critiques_with_a_shared_top_score(scores, paper, expected):
    row = critique("x", *scores)
    assert meta_rm.label(row, MetaRM(), 5.0) == paper
    assert meta_rm.label(row, MetaRM(tie="leave-out"), 5.0) == paper
    assert meta_rm.label(row, MetaRM(tie="expected"), 5.0) == pytest.approx(expected)


def test_a_critique_without_labels_keeps_its_verdict():
    row = dataclasses.replace(critique("x", 7, 3), labels=None, correct=False)
    assert meta_rm.label(row, MetaRM(tie="expected"), 5.0) == 0.0


def test_ties_and_decisive_critiques_are_measured_apart(monkeypatch):
    # A meta RM that reads nothing but whether the top score is shared.
    rows = [critique(item, *scores) for item in "ab" for scores in ((7, 3), (3, 7), (5, 5), (4, 4))]
    reads_ties = np.asarray([1.0, 1.0, 0.0, 0.0] * 2)
    run = SimpleNamespace(
        model=None, mesh=None,
        setup=SimpleNamespace(length_buckets=(8,), engine=SimpleNamespace(prefill_tokens=1)),
        templates=SimpleNamespace(single=SimpleNamespace(threshold=5.0)),
    )  # fmt: skip
    monkeypatch.setattr(meta_rm, "score_examples", lambda *_: reads_ties)
    pairs = [(row, Example((1,), (2,), label=float(bool(row.correct)))) for row in rows]
    figures = meta_rm.validate(run, {}, pairs, 8)  # pyright: ignore[reportArgumentType]
    assert figures["auc_ties"] == 1.0
    assert figures["auc_decisive"] == 0.5
    # Of one right and three wrong critiques, two are told apart, and one is not: (1 + 1 + 0.5) / 3.
    assert figures["auc_within_item"] == figures["auc"] == pytest.approx(2.5 / 3)
    alone = [pair for pair in pairs if pair[0].scores == (7, 3)]
    monkeypatch.setattr(meta_rm, "score_examples", lambda *_: np.ones(2))
    assert math.isnan(meta_rm.validate(run, {}, alone, 8)["auc_ties"])  # pyright: ignore[reportArgumentType]
