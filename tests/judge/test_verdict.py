"""Requests and verdicts: what is asked, what k critiques say together, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import rankdata

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import Judgement, Verdict, decide


def request(n=2, **options) -> JudgeRequest:
    return JudgeRequest.make("q", [f"r{i}" for i in range(n)], options=ScoreOptions(**options))


def said(*rows, meta=None, expected=None) -> list[Judgement]:
    """Critiques with these scores; a text is the name of a failure."""
    n = max((len(row) for row in rows if not isinstance(row, str)), default=2)
    return [
        Judgement(
            example_id="x", sample=i, order=tuple(range(n)), finish_reason="stop",
            scores=None if isinstance(row, str) else row,
            failure=row if isinstance(row, str) else None,
            meta=None if meta is None or isinstance(row, str) else meta[i],
            expected=None if expected is None else expected[i],
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def test_votes_are_sums_and_what_failed_is_left_out():
    rows = said((8.0, 3.0, 8.0), "no_box", (6.0, 5.0, 7.0), "truncated", "no_box")
    verdict = decide(request(3, k=5), rows, scale=(1, 10))
    assert verdict.totals == (14.0, 8.0, 15.0) and verdict.scores == (7.0, 4.0, 7.5)
    assert verdict.values == verdict.totals and verdict.method == "vote"
    assert verdict.best == (2,) and verdict.winner == 2 and not verdict.tie
    assert verdict.rewards == (0.5, 0.0, 1.0)
    np.testing.assert_allclose(verdict.std, np.std([[8, 3, 8], [6, 5, 7]], axis=0))
    assert verdict.failures == {"no_box": 2, "truncated": 1} and verdict.failure is None
    assert [row.votes for row in verdict.critiques] == [True, False, True, False, False]
    # The winner has a top score in both.
    assert verdict.agreement == 1.0


def test_without_a_readable_critique_there_are_no_numbers():
    verdict = decide(request(2), said("no_box", "truncated", "no_box"), scale=(1, 10))
    assert verdict.failure == "no_box" and verdict.winner is None and not verdict.tie
    assert verdict.scores == verdict.totals == verdict.values == verdict.rewards == ()
    assert verdict.best == verdict.std == () and verdict.agreement is None
    hybrid = decide(
        request(2, method="hybrid"), said("empty"), scale=(1, 10), scalar=(1.0, 2.0)
    )  # fmt: skip
    assert hybrid.failure == "empty" and hybrid.values == () and hybrid.scalar == (1.0, 2.0)


def test_rewards_are_ranks_with_ties_shared():
    scores = (3.0, 7.0, 3.0, 9.0, 1.0)
    verdict = decide(request(5), said(scores), scale=(1, 10))
    np.testing.assert_allclose(verdict.rewards, (rankdata(scores) - 1) / 4)
    tie = decide(request(2), said((4.0, 4.0)), scale=(1, 10))
    assert tie.rewards == (0.5, 0.5) and tie.tie and tie.winner is None and tie.best == (0, 1)
    alone = decide(request(1), said((4.0,), (7.0,)), scale=(1, 10))
    assert alone.rewards == ((5.5 - 1) / 9,)


def test_the_meta_rm_selects_or_weighs():
    rows = said((8.0, 3.0), (2.0, 9.0), (1.0, 9.0), "no_box", meta=(2.0, -1.0, -3.0, None))
    guided = decide(request(2, k=4, k_meta=1), rows, scale=(1, 10), guided=True)
    assert guided.method == "guided" and guided.totals == (8.0, 3.0)
    assert [row.votes for row in guided.critiques] == [True, False, False, False]
    half = decide(request(2, k=4), rows, scale=(1, 10), guided=True)
    assert half.totals == (10.0, 12.0)
    weighted = decide(request(2, k=4, method="weighted"), rows, scale=(1, 10), guided=True)
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, -3.0])))
    total = p @ np.array([[8.0, 3.0], [2.0, 9.0], [1.0, 9.0]])
    np.testing.assert_allclose(weighted.totals, total, atol=1e-8)
    np.testing.assert_allclose(weighted.scores, total / p.sum(), atol=1e-8)
    assert weighted.winner == 0 and weighted.agreement == pytest.approx(p[0] / p.sum())
    plain = decide(request(2, k=4, method="vote"), rows, scale=(1, 10), guided=True)
    assert plain.totals == (11.0, 21.0)


def test_hybrid_adds_the_scalar_score_to_the_centred_vote():
    rows = said((6.0, 5.0, 1.0), (6.0, 7.0, 1.0))
    options = {"method": "hybrid", "scalar_weight": 2.0}
    verdict = decide(request(3, **options), rows, scale=(1, 10), scalar=(3.0, 0.0, 0.0))
    mean, scalar = np.array([6.0, 6.0, 1.0]), np.array([3.0, 0.0, 0.0])
    np.testing.assert_allclose(
        verdict.values, mean - mean.mean() + 2 * (scalar - scalar.mean()), atol=1e-8
    )
    assert verdict.winner == 0 and verdict.totals == (12.0, 12.0, 2.0)


def test_expected_scores_vote_in_place_of_the_drawn_digits():
    rows = said((8.0, 8.0), (7.0, 7.0), "no_box", expected=((7.5, 8.1), (6.9, 7.2), None))
    verdict = decide(request(2, expected=True), rows, scale=(1, 10))
    np.testing.assert_allclose(verdict.totals, (14.4, 15.3))
    assert verdict.winner == 1
    # What failed does not vote, whatever its digits were (a critique too long for the meta RM).
    rows[0] = dataclasses.replace(rows[0], scores=None, failure="meta_length")
    left = decide(request(2, expected=True), rows, scale=(1, 10))
    assert left.totals == (6.9, 7.2) and left.failures == {"meta_length": 1, "no_box": 1}


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [
        ("guided", 2, "needs a meta RM"),
        ("weighted", 2, "needs a meta RM"),
        ("hybrid", 2, "needs a scalar RM"),
        ("hybrid", 1, "needs a scalar RM"),
    ],
)
def test_a_method_that_the_judge_does_not_have_is_refused(method, n, message):
    with pytest.raises(UserError, match=message):
        decide(request(n, method=method), said((1.0,) * n), scale=(1, 10))


def test_hybrid_of_one_response_is_refused():
    with pytest.raises(UserError, match="compares responses"):
        decide(request(1, method="hybrid"), said((1.0,)), scale=(1, 10), scalar=(1.0,))


def test_a_verdict_is_json():
    verdict = decide(request(2), said((8.0, 3.0), "no_box"), scale=(1, 10), seconds=1.23456)
    assert isinstance(verdict, Verdict)
    read = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert read["scores"] == [8.0, 3.0] and read["winner"] == 0 and read["seconds"] == 1.235
    assert [row["failure"] for row in read["critiques"]] == [None, "no_box"]
    assert "critiques" not in verdict.to_json(critiques=False)


def test_messages_become_a_conversation_and_replies_become_texts():
    made = JudgeRequest.make(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "And 3 + 3?"},
        ],
        [
            "6",
            [{"role": "assistant", "content": "six"}],
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "3"}}]},
        ],
        principles=["Right: 1"],
        criteria="It is short.",
        reference="6",
    )
    record = made.record
    assert [turn["role"] for turn in record.turns] == ["system", "user", "assistant", "user"]
    assert record.responses == ("6", "six", "[tool call] add 3")
    assert record.principles == ("Right: 1", "It is short.") and record.reference == "6"


def test_equal_texts_have_equal_ids_and_options_tell_requests_apart():
    one, other = JudgeRequest.make("q", ["a", "b"]), JudgeRequest.make("q", ["a", "b"])
    assert one.record.id == other.record.id and one.digest == other.digest
    assert JudgeRequest.make("q", ["ab", ""]).record.id != one.record.id
    assert JudgeRequest.make("q", ["b", "a"]).record.id != one.record.id
    assert JudgeRequest.make("q", ["a"], reference="b").record.id != one.record.id
    for change in ({"k": 4}, {"seed": 1}, {"temperature": 0.0}, {"expected": True}):
        assert dataclasses.replace(one, options=ScoreOptions(**change)).digest != one.digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "query: missing"),
        ({"query": "q"}, "responses: missing"),
        ({"query": "", "responses": ["a"]}, "query: empty"),
        ({"query": "q", "responses": []}, "responses: an empty list"),
        ({"query": "q", "responses": "a"}, "responses: .*give a list"),
        ({"query": "q", "responses": ["a"] * 257}, "at most 256"),
        ({"query": "q", "responses": [1]}, r"responses\[0\]: .*give a text"),
        ({"query": {"role": "user"}, "responses": ["a"]}, "query: .*list of messages"),
        ({"query": [], "responses": ["a"]}, "query: .*turn"),
        ({"query": [{"role": "robot", "content": "x"}], "responses": ["a"]}, "robot"),
        ({"query": [{"role": "assistant", "content": "x"}], "responses": ["a"]}, "last turn"),
        ({"query": "q", "responses": ["\ud800"]}, r"responses\[0\]: a lone surrogate"),
        ({"query": "q", "responses": ["a"], "principles": []}, "principles"),
        ({"query": "q", "responses": ["a"], "principles": "p"}, "principles"),
        ({"query": "q", "responses": ["a"], "criteria": " "}, r"criteria\[0\]: empty"),
        ({"query": "q", "responses": ["a"], "reference": 3}, "reference: .*give a string"),
        ({"query": "q", "responses": ["a"], "kk": 3}, "unknown field 'kk'"),
        ({"query": "q", "responses": ["a"], "k": 0}, "k is 0"),
        ({"query": "q", "responses": ["a"], "k": -1}, "k is -1"),
        ({"query": "q", "responses": ["a"], "k": 2.0}, "k is 2.0"),
        ({"query": "q", "responses": ["a"], "k": True}, "k is"),
        ({"query": "q", "responses": ["a"], "k": 10**6}, "from 1 to 1024"),
        ({"query": "q", "responses": ["a"], "seed": -1}, "seed is -1"),
        ({"query": "q", "responses": ["a"], "temperature": -0.1}, "temperature is -0.1"),
        ({"query": "q", "responses": ["a"], "temperature": "hot"}, "temperature is"),
        ({"query": "q", "responses": ["a"], "temperature": float("nan")}, "temperature is"),
        ({"query": "q", "responses": ["a"], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"query": "q", "responses": ["a"], "order": "other"}, "order is"),
        ({"query": "q", "responses": ["a"], "method": "best"}, "method is"),
        ({"query": "q", "responses": ["a"], "k_meta": 9}, "k_meta is 9"),
        ({"query": "q", "responses": ["a"], "adaptive": 2.0}, "adaptive is 2.0"),
        ({"query": "q", "responses": ["a"], "rating": 1}, "rating is 1"),
    ],
)  # fmt: skip
def test_a_request_that_can_not_be_judged_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        JudgeRequest.from_json(values)


def test_defaults_hold_where_a_request_does_not_say():
    asked = {"query": "q", "responses": ["a"], "k": 3, "seed": None}
    assert JudgeRequest.from_json(asked, k=16, seed=5).options == ScoreOptions(k=3, seed=5)


def test_requests_and_verdicts_need_no_jax():
    program = (
        "import sys, grm_jax.judge.request, grm_jax.judge.verdict;"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
