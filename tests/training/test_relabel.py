"""Wrong critiques with exchanged scores: what is changed, what can not be, what RFT learns then."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from grm_jax.critique import is_correct, read
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.data.trajectories import Trajectory, to_trajectory
from grm_jax.training import rft
from grm_jax.training.options import RFT, Fitting
from grm_jax.training.relabel import relabelled

TEMPLATES = Templates.load(TemplateConfig("short", "short_single", "meta"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def written(make_critique, make_record):
    """(text, labels, order) -> its trajectory, read and judged as RFT does."""

    def make(text: str, labels=(1, 0), order=(0, 1), **more) -> Trajectory:
        record = make_record("r", labels)
        parsed = read(TEMPLATES.many if len(labels) > 1 else TEMPLATES.single, text, len(labels))
        scores = parsed.scores and tuple(parsed.scores[order.index(i)] for i in range(len(labels)))
        critique = dataclasses.replace(
            make_critique("r", 0, scores, order=order), text=text, failure=parsed.failure
        )
        correct = is_correct(scores, record.labels)
        return to_trajectory(record, critique, correct, kept=correct, **more)

    return make


@pytest.mark.parametrize(
    ("text", "labels", "order", "expected"),
    [
        ("b is better \\boxed{3, 8}", (1, 0), (0, 1), "b is better \\boxed{8, 3}"),
        ("\\boxed{10, 3}", (1, 0), (1, 0), "\\boxed{3, 10}"),
        # the best takes the winner's score, and the third keeps its own
        ("\\boxed{2, 9, 5}", (0, 5, 9), (0, 1, 2), "\\boxed{2, 5, 9}"),
        ("\\boxed{9,1, 5} so", (9, 0, 5), (1, 2, 0), "\\boxed{5,1, 9} so"),
        ("\\boxed{1, 2} no: \\boxed{08, 9}", (1, 0), (0, 1), "\\boxed{1, 2} no: \\boxed{9, 8}"),
    ],
)
def test_the_best_response_gets_the_winners_score(written, text, labels, order, expected):
    row = written(text, labels, order)
    assert not row.correct and not row.kept
    changed = relabelled(row, TEMPLATES)
    assert changed is not None and changed.scores is not None and changed.text == expected
    assert changed.correct and changed.kept and is_correct(changed.scores, changed.labels)
    shown = read(TEMPLATES.many, expected, len(labels)).scores
    assert shown == tuple(changed.scores[index] for index in order)
    assert changed.order == row.order
    assert dataclasses.replace(row, text=expected, scores=changed.scores) == dataclasses.replace(
        changed, correct=False, kept=False
    )


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("\\boxed{5, 5}", (1, 0)),  # no exchange decides
        ("\\boxed{2, 7, 7}", (9, 0, 1)),
        ("no box", (1, 0)),
        ("\\boxed{2.5, 7.5}", (1, 0)),  # not whole
        ("\\boxed{２, ７}", (1, 0)),
    ],
)
def test_what_can_not_be_exchanged_is_left(written, text, labels):
    row = written(text, labels, tuple(range(len(labels))))
    assert not row.correct
    assert relabelled(row, TEMPLATES) is None


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [(0, 1, "1"), (1, 0, "0"), (3, 1, "8"), (9, 0, "2"), (5, 1, None)],
)
def test_a_single_score_is_mirrored(written, score, label, expected):
    """Of 0 and 1, of 1..10, and of 0..10, whose middle has no other side."""
    low, high = {0: (0, 1), 1: (0, 1), 5: (0, 10)}.get(score, (1, 10))
    middle = None if high == 1 else (low + high) / 2
    single = dataclasses.replace(TEMPLATES.single, low=low, high=high)
    assert single.threshold == middle
    row = dataclasses.replace(
        written("\\boxed{0}", (1 - label,), (0,)),
        text=f"so: \\boxed{{{score}}}", scores=(float(score),), labels=(float(label),),
        correct=False, kept=False, failure=None,
    )  # fmt: skip
    changed = relabelled(row, dataclasses.replace(TEMPLATES, single=single))
    if expected is None:
        assert changed is None
    else:
        assert changed is not None and changed.text == f"so: \\boxed{{{expected}}}"
        assert changed.scores == (float(expected),) and changed.correct


def a_run(tokenizer, **setup):
    setup = dict(length_buckets=(400,), long_prompts="error", **setup)
    return SimpleNamespace(
        templates=TEMPLATES, tokenizer=tokenizer, setup=SimpleNamespace(**setup),
        model=SimpleNamespace(max_position=10_000),
    )  # fmt: skip


def test_rft_learns_the_kept_and_the_relabelled(written, tokenizer, caplog):
    rows = [written("\\boxed{8, 3}"), written("\\boxed{3, 8}"), written("\\boxed{5, 5}")]
    run = a_run(tokenizer)
    assert rft.to_learn(run, RFT(), rows) == rows[:1]  # pyright: ignore[reportArgumentType]
    with caplog.at_level(logging.INFO, "grm_jax"):
        found = rft.to_learn(run, RFT(relabel=True), rows)  # pyright: ignore[reportArgumentType]
    assert [row.text for row in found] == ["\\boxed{8, 3}"] * 2
    assert "1 of 2 wrong critiques relabelled" in caplog.text
    assert rows[1].text == "\\boxed{3, 8}"  # the meta RM learns from what was written


def test_no_record_is_too_easy_where_wrong_critiques_are_learnt(make_critique, make_record):
    plain = [make_critique("r", i, (1, 9)) for i in range(3)]
    record = make_record("r", (0, 1))
    for relabel in (False, True):
        rows = list(rft._judge(record, plain, [], relabel=relabel))
        assert [row.kept for row in rows] == [relabel] * 3


def test_tokens_before_the_box_have_their_weight(written, tokenizer, tmp_path):
    text = "Specific Criteria: answer high\nScores: \\boxed{8, 3}"
    row, run = written(text), a_run(tokenizer)
    config = RFT(text_weight=0.25, fitting=Fitting(pack=0))
    (example,) = rft.as_examples(run, config, [row], tmp_path)  # pyright: ignore[reportArgumentType]
    (plain,) = rft.as_examples(run, RFT(), [row], tmp_path)  # pyright: ignore[reportArgumentType]
    assert plain.weights is None and plain.completion == example.completion
    assert example.weights is not None and len(example.weights) == len(example.completion)
    box = len(tokenizer.completion("\nScores: \\boxed{8, 3}"))
    before = len(example.completion) - box
    assert example.weights == (0.25,) * before + (1.0,) * box
