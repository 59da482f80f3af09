"""Evaluations that users ran: other scales, judges without an order, names that break tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grm_jax.benchmarks import get_benchmark
from grm_jax.critique import Turn
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.assess import assess
from grm_jax.scoring.judges import judge_rows
from grm_jax.scoring.replay import decided_after
from grm_jax.scoring.report import Grid, summary

TURNS = (Turn(role="user", content="q"),)


def records(count, *, domain=""):
    return [
        Preference(str(i), (Turn(role="user", content=f"q{i}"),), (f"{i} long", "no"), (1.0, 0.0),
                   domain=domain)
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [1.0, 9.0, 100.0])
def test_adaptive_stops_at_the_same_sample_on_every_scale(width):
    unit = np.random.default_rng(3).random((50, 16, 2))
    unit[:, :, 0] += 0.3
    known = decided_after(unit * 1.0, 0.01, 0.0, 1.0).tolist()
    assert decided_after(unit * width, 0.01, 0.0, width).tolist() == known
    assert 4 <= min(known) < 16


def test_adaptive_asks_the_threshold_of_the_rule():
    scores = np.full((1, 16, 1), 30.0) + np.arange(16)[None, :, None] % 3
    assert decided_after(scores, 0.01, 0.0, 100.0, 80.0)[0] < 16
    assert decided_after(scores, 0.01, 0.0, 100.0, 31.0)[0] == 16


@pytest.mark.parametrize("judge", ["longer", "random"])
def test_judges_that_see_no_order_have_no_position(judge):
    found = records(12)
    results = assess(
        get_benchmark("preferences"), found, judge_rows(judge, found, k=4), judge=judge,
        resamples=50,
    )  # fmt: skip
    assert "position" not in {finding.kind for finding in results.bias}


def test_names_can_not_break_a_table():
    name = "a\n\n| b | <b>c</b> `d` \\| e"
    text = Grid("t\n# x", ("", name), ((name, "1"),)).markdown()
    lines = text.splitlines()
    assert len(lines) == 5 and lines[0] == "t # x"
    assert "<b>" not in text
    for line in lines[2:]:
        plain = line.replace("\\\\", "").replace("\\|", "")
        assert plain.count("|") == 3


def test_the_commonest_box_of_each_failure_is_shown():
    texts = ["a \\boxed{8 9}", "b \\boxed{8 9}", "c \\boxed{8/9}", "d \\boxed{8, 9\n, \x1b[7m7}"]
    kinds = ["separators"] * 3 + ["wrong_count"]
    record = records(1)
    rows = [
        Critique("0", i, (0, 1), None, kind, "stop", text)
        for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))
    ]
    rows.append(Critique("0", 4, (0, 1), (8, 9), None, "stop", "\\boxed{8, 9}"))
    rates = aggregate(record, rows).rates["sampled"]
    assert rates.boxes["separators"] == ("\\boxed{8 9}", 2)
    results = assess(get_benchmark("preferences"), record, rows, judge="m", resamples=10)
    lines = "\n".join(summary(results))
    assert "separators, the commonest box (2 times): \\boxed{8 9}" in lines
    assert "\x1b" not in lines


def test_rows_of_rmb_whose_last_turn_is_empty_are_judged(tmp_path):
    folder = tmp_path / "RMB_dataset" / "Pairwise_set" / "Helpfulness"
    folder.mkdir(parents=True)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"},
            {"role": "user", "content": ""}]  # fmt: skip
    row = {"pair_uid": "1", "conversation_input": said, "chosen": {"answer": "a"},
           "reject": {"answer": "b"}}  # fmt: skip
    (folder / "Open.json").write_text(json.dumps([row]))
    (found,) = get_benchmark("rmb").load(tmp_path / "RMB_dataset")
    assert found.query == "" and len(found.turns) == 3
