"""The share of votes against accuracy, by hand."""

from __future__ import annotations

import pytest

from grm_jax.scoring.calibration import calibration


def votes(row, id: str, right: int, wrong: int) -> list:
    """Samples of a pair: how many prefer the first response, and how many the second."""
    scores = [(9, 1)] * right + [(1, 9)] * wrong
    return [row(id, i, one) for i, one in enumerate(scores)]


def test_bins_error_and_overconfidence(record, row) -> None:
    records = [record(f"r{i}") for i in range(4)]
    rows = [
        *votes(row, "r0", 4, 0),  # confidence 1, right
        *votes(row, "r1", 0, 4),  # confidence 1, wrong
        *votes(row, "r2", 3, 1),  # confidence 0.75, right
        *votes(row, "r3", 1, 3),  # confidence 0.75, wrong
        row("r0", -1, (1, 9)),  # greedy critiques do not vote
    ]
    found = calibration(records, rows, threshold=0.5, resamples=20)
    assert found is not None and (found.k, found.records) == (4, 4)
    assert [(one.low, one.high, one.records) for one in found.bins] == [
        (0.7, 0.8, 2),
        (0.9, 1.0, 2),
    ]
    assert [one.accuracy.value for one in found.bins] == [0.5, 0.5]
    assert [one.confidence for one in found.bins] == [0.75, 1.0]
    assert found.error == pytest.approx((0.25 + 0.5) / 2)
    assert found.overconfidence.value == pytest.approx(0.375)


def test_ties_single_responses_and_what_does_not_count(record, row) -> None:
    tie = [row("tie", 0, (5, 5)), row("tie", 1, (5, 5))]
    single = [row("one", i, (score,)) for i, score in enumerate((1, 1, 0, 1))]
    lost = [row("lost", 0, None), row("lost", 1, (9, 1))]  # one readable critique is no vote
    records = [record("tie"), record("one", 1, label=0.0), record("lost")]
    found = calibration(records, [*tie, *single, *lost], threshold=0.5, resamples=20)
    assert found is not None and found.records == 2
    # The tie: half of each vote for either, right half of the time; the single one: 3 of 4, wrong.
    assert [(one.confidence, one.accuracy.value) for one in found.bins] == [(0.5, 0.5), (0.75, 0.0)]
    assert calibration(records[:1], [row("tie", -1, (5, 5))], threshold=0.5) is None
