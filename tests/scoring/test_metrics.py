"""Figures of every benchmark on rows made by hand, whose answer stands beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from grm_jax.benchmarks import get_benchmark
from grm_jax.benchmarks.ppe_correctness import best_of
from grm_jax.data.critiques import GREEDY, Critique
from grm_jax.data.rows import DataError
from grm_jax.scoring.assess import assess, judge_scores
from grm_jax.scoring.figures import Macro, RocAuc
from grm_jax.scoring.items import Item
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.statistics import roc_auc

LLMBAR = Path(__file__).parents[3] / "shared" / "data" / "llmbar"
USER = ({"role": "user", "content": "q"},)


def item(id, n=2, *, labels=None, domain="", item="", place="", query=None):
    labels = (1.0,) + (0.0,) * (n - 1) if labels is None else tuple(map(float, labels))
    turns = ({"role": "user", "content": query or item or id},)
    texts = tuple(f"response {i}" for i in range(len(labels)))
    return Item(id, turns, texts, labels, domain=domain, item=item, place=place)


def greedy(id, scores, n=2):
    size = n if scores is None else len(scores)
    return Critique(
        id, GREEDY, tuple(range(size)), None if scores is None else tuple(map(float, scores)),
        "no_box" if scores is None else None, "stop",
    )  # fmt: skip


def figures(bench, records, rows, rules=None, method="greedy"):
    """Figures of a method by group and name."""
    benchmark = get_benchmark(bench)
    scored = judge_scores(benchmark, records, rows, rules or benchmark.authors)
    once = np.ones((1, len(records)))
    found: dict[str, dict[str, float]] = {}
    for figure in scored.figures:
        value = float(scored.bound(method, figure)(once)[0])
        found.setdefault(figure.group, {})[figure.name] = value
    return found


def test_every_tie_and_unparsed_rule():
    # Three of a kind: right, a tie of two with the best, a tie without it, unreadable.
    records = [item(name, 3) for name in "abcd"]
    rows = [
        greedy("a", [9, 1, 1]), greedy("b", [5, 5, 1]), greedy("c", [1, 5, 5]),
        greedy("d", None, 3),
    ]  # fmt: skip
    for ties, b in (("wrong", 0), ("half", 0.5), ("shared", 0.5), ("random", 0.5)):
        for unparsed, d in (("wrong", 0), ("half", 0.5), ("chance", 1 / 3)):
            rules = Rules(ties=ties, unparsed=unparsed)
            found = figures("preferences", records, rows, rules)["overall"]["accuracy"]
            assert found == pytest.approx((1 + b + 0 + d) / 4), (ties, unparsed)
    # Excluded: only a and the wrong ones that are no tie count.
    both = Rules(ties="excluded", unparsed="excluded")
    assert figures("preferences", records, rows, both)["overall"]["accuracy"] == 1.0
    one = Rules(ties="excluded", unparsed="wrong")
    assert figures("preferences", records, rows, one)["overall"]["accuracy"] == 0.5
    # Shared among three is a third, half stays a half.
    rows = [greedy("a", [5, 5, 5])]
    for ties, value in (("shared", 1 / 3), ("half", 0.5)):
        rules = Rules(ties=ties)
        found = figures("preferences", records[:1], rows, rules)["overall"]["accuracy"]
        assert found == pytest.approx(value)


def test_rewardbench2_best_of_four_and_ties():
    records = [
        item("Math/1", 4, domain="Math"),
        item("Math/2", 4, domain="Math"),
        item("Focus/1", 4, domain="Focus"),
        item("Ties/ref:1", labels=[1, 0, 0], domain="Ties", item="Ties/1", place="ref"),
        item("Ties/tied:1", labels=[1, 1, 0, 0], domain="Ties", item="Ties/1", place="tied"),
        item("Ties/ref:2", labels=[1, 0], domain="Ties", item="Ties/2", place="ref"),
        item("Ties/tied:2", labels=[1, 1, 0], domain="Ties", item="Ties/2", place="tied"),
    ]
    rows = [
        greedy("Math/1", [7, 7, 1, 1]),  # shared: 1/2
        greedy("Math/2", None, 4),  # unreadable: 1/4
        greedy("Focus/1", [3, 1, 1, 1]),
        greedy("Ties/ref:1", [9, 4, 2]),  # margin 5
        greedy("Ties/tied:1", [9, 8, 5, 1]),  # margin 3, spread 1
        greedy("Ties/ref:2", [5, 6]),  # margin -1
        greedy("Ties/tied:2", [9, 5, 3]),  # margin 2, spread 4
    ]
    found = figures("rewardbench2", records, rows)
    # Accurate: tied 2 of 2, ref 1 of 2. Margin > spread: 3 > 1, not 2 > 4. min(5, 3) > 1 and not
    # min(-1, 2) > 4. tanh(3/1 - 1) and tanh(-1/4 - 1).
    margin = (math.tanh(2.0) + math.tanh(-1.25)) / 2
    ties = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert found["sections"] == pytest.approx({"Math": 0.375, "Focus": 1.0, "Ties": ties})
    assert found["overall"]["mean"] == pytest.approx((0.375 + 1.0 + ties) / 3)
    # All right answers alike: 0/0 counts 0, a positive margin over no spread counts 1.
    rows[4] = greedy("Ties/tied:1", [9, 9, 9, 1])
    rows[6] = greedy("Ties/tied:2", [9, 9, 8])
    margin = (0.0 + math.tanh(-math.inf)) / 2
    ties = 0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.0 + 0.01 * margin
    assert figures("rewardbench2", records, rows)["sections"]["Ties"] == pytest.approx(ties)


def test_a_perfect_judge_of_rewardbench2_has_an_interval():
    records = [item(f"Math/{i}", 4, domain="Math") for i in range(30)]
    rows = [greedy(record.id, [9, 1, 1, 1]) for record in records]
    for i in range(20):
        for place, labels in (("ref", [1, 0]), ("tied", [1, 1, 0])):
            name = f"Ties/{place}:{i}"
            records.append(item(name, labels=labels, domain="Ties", item=f"Ties/{i}", place=place))
            rows.append(greedy(name, [9, 8.5, 1][: len(labels)] if place == "tied" else [9, 1]))
    benchmark = get_benchmark("rewardbench2")
    found = assess(benchmark, records, rows, judge="j", resamples=50).methods[0].figures
    ties = found["sections"]["Ties"]  # the authors' weights add up to 1.01
    assert 1.0 < ties.value <= 1.01 and ties.low <= ties.value <= ties.high
    assert found["sections"]["Math"].low < 0.95


def test_what_no_method_defines_is_left_out_and_a_missing_headline_is_named():
    records = [item("a"), item("b")]
    rows = [greedy("a", None), greedy("b", None)]
    rows += [Critique(name, i, (0, 1), (2.0, 1.0), None, "stop") for name in "ab" for i in range(2)]
    benchmark, rules = get_benchmark("preferences"), Rules(unparsed="excluded")
    found = assess(benchmark, records, rows, judge="j", rules=rules, resamples=50)
    assert found.figure("greedy") is None
    voted = found.figure("vote@2")
    assert voted is not None and voted.value == 1.0
    with pytest.raises(DataError, match="overall accuracy of preferences is not defined on these"):
        assess(benchmark, records, rows[:2], judge="j", rules=rules)


def test_rmb_needs_every_pair_of_a_best_of_n():
    records = [
        item("a/0", domain="Help-BoN", item="a"), item("a/1", domain="Help-BoN", item="a"),
        item("b/0", domain="Help-BoN", item="b"), item("b/1", domain="Help-BoN", item="b"),
        item("c", domain="Help-Pair"), item("d", domain="Harm-BoN", item="d"),
        item("e", domain="Harm-Pair"), item("f", domain="Harm-Pair"), item("g", domain="Harm-Pair"),
    ]  # fmt: skip
    rows = [
        greedy("a/0", [2, 1]), greedy("a/1", [2, 1]),  # a hit
        greedy("b/0", [2, 1]), greedy("b/1", [2, 2]),  # a tie: a miss
        greedy("c", [2, 1]), greedy("d", None), greedy("e", [2, 1]), greedy("f", [1, 2]),
        greedy("g", [3, 1]),
    ]  # fmt: skip
    found = figures("rmb", records, rows)
    assert found["sections"] == pytest.approx(
        {"Help-BoN": 0.5, "Help-Pair": 1.0, "Harm-BoN": 0.0, "Harm-Pair": 2 / 3}
    )
    assert found["overall"]["mean"] == pytest.approx((0.5 + 1 + 0 + 2 / 3) / 4)
    # The paper's rule: a tie is drawn, so b's second pair is right half of the time.
    soft = figures("rmb", records, rows, Rules(form="pairs"))
    assert soft["sections"]["Help-BoN"] == 0.75


def test_rm_bench_matrix():
    # Row 1 is right unless a plainer chosen one meets markdown; row 2 is always a tie.
    records, rows = [], []
    for row in (1, 2):
        for i in range(3):
            for j in range(3):
                name = f"chat/{row}/{i}{j}"
                records.append(item(name, domain="chat", item=f"chat/{row}", place=f"{i}{j}"))
                right = not (i < j == 2)
                rows.append(greedy(name, [5, 5] if row == 2 else ([2, 1] if right else [1, 2])))
    found = figures("rm-bench", records, rows)
    # Of row 1: hard cells 01 right, 02 and 12 wrong -> 1/3; halved by row 2.
    assert found["levels"] == pytest.approx({"easy": 0.5, "normal": 0.5, "hard": 1 / 6})
    assert found["overall"]["mean"] == pytest.approx((0.5 + 0.5 + 1 / 6) / 3)
    assert found["matrix"]["concise > markdown"] == 0.0
    # The same scores from one question of six responses a row.
    lists = [item("chat/1", labels=[1] * 3 + [0] * 3, domain="chat")]
    scores = [greedy("chat/1", [5, 6, 7, 4, 5, 8])]
    found = figures("rm-bench", lists, scores, Rules(ties="wrong", form="list"))
    # 5>4; 5=5 (a tie loses), 5<8; 6>4, 6>5, 6<8; 7>4, 7>5, 7<8.
    assert found["levels"] == pytest.approx({"easy": 1.0, "normal": 2 / 3, "hard": 0.0})


def test_judgebench_adds_up_two_games():
    outcomes = {
        "a": ([2, 1], [1, 2]),  # right, right
        "b": ([2, 1], [2, 1]),  # right, wrong: 0
        "c": ([2, 1], [3, 3]),  # right, tie: 1
        "d": ([2, 2], [2, 2]),  # ties: 0
        "e": ([2, 1], None),  # right, none: 1
        "f": ([1, 2], None),  # wrong, none: -1
    }
    records, rows = [], []
    for name, games in outcomes.items():
        records.append(item(name, domain="math", item=name))
        swapped = item(f"{name}#swapped", labels=[0, 1], domain="math", item=name)
        records.append(swapped)
        rows += [greedy(name, games[0]), greedy(f"{name}#swapped", games[1])]
    found = figures("judgebench", records, rows)
    assert found["overall"]["accuracy"] == pytest.approx(3 / 6)
    assert found["games"] == pytest.approx(
        {"right in both": 1 / 6, "each game": 5 / 12, "agreement": 1 / 6}
    )


@pytest.mark.skipif(not LLMBAR.is_dir(), reason=f"LLMBar's judge outputs are not at {LLMBAR}")
@pytest.mark.parametrize("judge", ["Rating", "Vanilla"])
def test_llmbar_gives_the_published_statistics(judge):
    folder = LLMBAR / "judge_outputs" / "Natural"
    outputs = json.loads((folder / f"GPT-4_{judge}_result.json").read_text())
    wanted = json.loads((folder / f"GPT-4_{judge}_statistics.json").read_text())
    records = get_benchmark("llmbar").load(LLMBAR / "LLMBar" / "Natural" / "dataset.json")
    assert len(records) == 2 * len(outputs) == 200
    rows = []
    for place, output in enumerate(outputs):
        (result,) = output["results"]
        for swap in (False, True):
            record = records[2 * place + swap]
            if judge == "Rating":
                scores = [float(result[f"score_{i}"][0]) for i in (1, 2)]
            else:
                winner = int(result[f"swap = {swap}"]["winner"])
                scores = [float(winner == 1), float(winner == 2)]
            rows.append(greedy(record.id, scores[::-1] if swap else scores))
    found = figures("llmbar", records, rows)
    assert f"{100 * found['overall']['mean']:.1f}%" == wanted["correct_average"]
    for ours, theirs in (("agreement", "equal"), ("right in both", "correct_both")):
        assert f"{100 * found['games'][ours]:.1f}%" == wanted[theirs].split("= ")[1]


def test_pandalm_is_a_classification():
    truth = {"a": (1, 0), "b": (1, 0), "c": (0, 1), "d": (0, 0), "e": (0, 0), "f": (0, 1)}
    said = {"a": [2, 1], "b": [2, 2], "c": [1, 2], "d": [3, 3], "e": [2, 1], "f": None}
    records = [item(name, labels=labels) for name, labels in truth.items()]
    found = figures("pandalm", records, [greedy(name, scores) for name, scores in said.items()])
    assert found["overall"]["accuracy"] == pytest.approx(3 / 6)
    # tie: P 1/2 R 1/2; first: P 1/2 R 1/2; second: P 1/1 R 1/2.
    assert found["overall"]["macro precision"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["overall"]["macro recall"] == pytest.approx(0.5)
    assert found["overall"]["macro f1"] == pytest.approx((0.5 + 0.5 + 2 / 3) / 3)


def test_macro_figures_of_resamples():
    classes = {"x": np.array([0, 1]), "y": np.array([2])}
    said = {"says x": np.array([[1.0], [0], [1]]), "says y": np.array([[0.0], [1], [0]])}
    counts = np.array([[1, 1, 1], [2, 0, 1]], float)
    recall = Macro("g", "r", "recall", classes).bind(said)(counts)
    assert recall.tolist() == [0.25, 0.5]  # y is never found; x 1 of 2, then 2 of 2


def test_realmistake_ranks_all_rows_and_each_cell():
    cells = ("answerability_classification, a", "answerability_classification, b")
    values = [(cells[0], 1, [9]), (cells[0], 0, [7]), (cells[0], 0, [9]), (cells[1], 1, [3]),
              (cells[1], 0, [2]), (cells[1], 1, None)]  # fmt: skip
    records = [
        Item(f"r{i}", USER, ("x",), (float(label),), domain=cell)
        for i, (cell, label, _) in enumerate(values)
    ]
    rows = [greedy(f"r{i}", scores, 1) for i, (_, _, scores) in enumerate(values)]
    found = figures("realmistake", records, rows)
    # Positives 9, 3, unreadable (below all); negatives 7, 9, 2: 9 wins 2.5, 3 wins 1, the third 0.
    assert found["overall"]["ROC-AUC"] == pytest.approx(3.5 / 9)
    # Cells: 9 against 7, 9: 1.5/2; 3 and unreadable against 2: 1/2.
    assert found["overall"]["ROC-AUC, mean of cells"] == pytest.approx((0.75 + 0.5) / 2)
    rules = Rules(unparsed="excluded", form="single")
    assert figures("realmistake", records, rows, rules)["overall"]["ROC-AUC"] == pytest.approx(
        3.5 / 6
    )
    with pytest.raises(ValueError, match="no meaning in a ranking"):
        get_benchmark("realmistake").check(Rules(unparsed="half", form="single"))


def test_auc_of_a_resample_is_that_of_the_repeated_rows():
    rng = np.random.default_rng(0)
    labels = rng.random(40) < 0.4
    scores = rng.integers(0, 6, (40, 3)).astype(float)
    figure = RocAuc("g", "auc", np.flatnonzero(labels), np.flatnonzero(~labels))
    counts = rng.integers(0, 3, (5, 40)).astype(float)
    found = figure.bind({"score": scores})(counts)
    for row, value in zip(counts, found, strict=True):
        places = np.repeat(np.arange(40), row.astype(int))
        each = [roc_auc(scores[places, s], labels[places]) for s in range(3)]
        assert value == pytest.approx(np.mean(each))


def test_ppe_pairs_and_best_of_k():
    # Four responses, scores 4 > 3 = 3 > 1, right: the second, the fourth.
    scores, right = np.array([4.0, 3, 3, 1]), np.array([False, True, False, True])
    top, has = best_of(scores, right)
    # K=1: 2 of 4. K=2, 6 subsets: 12, 13, 14 no, 23 half, 24 yes, 34 no. K=3: 123, 124 no,
    # 134 no, 234 half. K=4: no.
    assert top.tolist() == pytest.approx([0.5, 1.5 / 6, 0.5 / 4, 0.0])
    assert has.tolist() == pytest.approx([0.5, 5 / 6, 1.0, 1.0])
    records = [
        Item(f"MATH/1/{i}", USER, (f"r{i}",), (float(right[i]),), domain="MATH", item="MATH/1",
             place=str(i))
        for i in range(4)
    ]  # fmt: skip
    rows = [greedy(f"MATH/1/{i}", [scores[i]], 1) for i in range(4)]
    found = figures("ppe-correctness", records, rows, Rules(form="single"))
    assert found["best of K"] == pytest.approx({"K=1": 0.5, "K=2": 0.25, "K=4": 0.0})
    assert found["overall"] == pytest.approx(
        {
            "best of K, end": 0.0,
            "best of K, maximum": 0.5,
            "best of K, loss": (0 + 3.5 / 6 + 0.875 + 1) / 4,
        }
    )
    assert found["ROC-AUC"] == {"MATH": pytest.approx(0.5 / 4)}  # 3 = 3 is a half
    pairs = [item(f"{d}/{i}", domain=d, item=f"{d}/q") for d in ("MATH", "GPQA") for i in (0, 1)]
    rows = [greedy("MATH/0", [2, 1]), greedy("MATH/1", [1, 1]), greedy("GPQA/0", [1, 2]),
            greedy("GPQA/1", None)]  # fmt: skip
    found = figures("ppe-correctness", pairs, rows)
    assert found["sections"] == {"MATH": 0.75, "GPQA": 0.0}
    assert found["overall"]["accuracy"] == 0.375


def test_scores_are_scaled_within_a_row_before_they_are_pooled():
    # Row 1 rates 8..10, row 2 1..3: unscaled, all of row 1 would be above row 2.
    values = [("1", 10, 1), ("1", 8, 0), ("2", 3, 1), ("2", 1, 0)]
    records = [
        Item(f"MATH/{q}/{s}", USER, ("r",), (float(label),), domain="MATH", item=f"MATH/{q}")
        for q, s, label in values
    ]
    rows = [greedy(f"MATH/{q}/{s}", [s], 1) for q, s, _ in values]
    found = figures("ppe-correctness", records, rows, Rules(form="single"))
    assert found["ROC-AUC"]["MATH"] == 1.0


def test_best_of_k_is_what_drawing_subsets_gives():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(1, 6, 9).astype(float), rng.random(9) < 0.5
    top, _ = best_of(scores, right)
    for k in (2, 5):
        drawn = []
        for _ in range(20_000):
            subset = rng.choice(9, k, replace=False)
            best = subset[scores[subset] == scores[subset].max()]
            drawn.append(right[rng.choice(best)])
        half = 3 * stats.sem(drawn)
        assert top[k - 1] == pytest.approx(np.mean(drawn), abs=half)
