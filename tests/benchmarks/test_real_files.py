"""Judges without a model on the files that the authors publish: chance, and length biases.

Chance of the random judge, by construction (scores without ties): 1/2 for a pair, 1/n for a list;
1/4 for JudgeBench, where both games must be right; 1/2 for a ROC-AUC; in PandaLM, where ties are a
class that it never says, half of the rows that are none.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from grm_jax import evaluate
from grm_jax.benchmarks import get_benchmark
from grm_jax.benchmarks.sources import locate
from grm_jax.scoring.assess import assess
from grm_jax.scoring.judges import judge_rows
from grm_jax.scoring.rules import Rules

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
# Benchmark -> (records asked, chance of the headline).
CHANCE = {
    "rewardbench": (2985, 0.5),
    "rm-bench": (9 * (129 + 284), 0.5),
    "judgebench": (2 * 350, 0.25),
    "llmbar": (2 * 234, 0.5),
    "pandalm": (999, 0.5 * (422 + 472) / 999),
    "hhh": (221, 0.5),
    "realmistake": (900, 0.5),
    "ppe-preference": (350, 0.5),
    "preferences": (2312, 0.5),
}
FILES = {"preferences": DATA / "hh_rlhf" / "harmless-base"}


def load(bench):
    benchmark = get_benchmark(bench)
    return benchmark, benchmark.load(FILES.get(bench) or locate(benchmark, DATA, None))


def judged(bench, judge, **more):
    benchmark, records = load(bench)
    rows = judge_rows(judge, records, rating=benchmark.rating, **more)
    return assess(benchmark, records, rows, judge=judge, resamples=400)


@pytest.mark.parametrize("bench", CHANCE)
def test_the_random_judge_is_at_chance(bench):
    found = judged(bench, "random", k=8, seed=2)
    count, chance = CHANCE[bench]
    assert found.records == count
    for method in ("greedy", "sample@1", "vote@8"):
        figure = found.figure(method)
        assert figure is not None
        # The interval, a little wider: twenty-seven of 95% would miss once or twice.
        slack = 0.25 * (figure.high - figure.low)
        assert figure.low - slack <= chance <= figure.high + slack, (method, figure)
    assert found.unjudged == ()


def test_rmb_is_read_whole():
    """Also its rows whose last turn is empty; a list is right where each of its pairs is."""
    _, records = load("rmb")
    assert len(records) == 1231 and records.skipped == ()
    assert sum(not record.query for record in records) == 5
    found = judged("rmb", "random", k=8, seed=2)
    sections = next(m for m in found.methods if m.name == "sample@1").figures["sections"]
    for name in ("Help-Pair", "Harm-Pair"):
        assert sections[name].low < 0.5 < sections[name].high
    pairs = collections.Counter(r.item for r in records if r.domain == "Harm-BoN")
    chance = np.mean([0.5**count for count in pairs.values()])
    assert len(pairs) == 111 and sections["Harm-BoN"].low < chance < sections["Harm-BoN"].high


def test_longer_shows_the_known_biases_of_rewardbench():
    # Shares of rows whose chosen response is longer, counted on the file itself.
    subsets = judged("rewardbench", "longer").methods[0].figures["subsets"]
    for name, share in (
        ("alpacaeval-easy", 0.99), ("alpacaeval-hard", 0.99), ("math-prm", 0.08),
        ("refusals-dangerous", 0.08), ("llmbar-adver-neighbor", 0.12),
    ):  # fmt: skip
        assert subsets[name].value == pytest.approx(share, abs=0.01), name


def test_longer_loses_to_the_plain_style_of_rm_bench():
    # Markdown and detail are longer: easy where the chosen one has them, hard where it has not.
    levels = judged("rm-bench", "longer").methods[0].figures["levels"]
    assert levels["easy"].value > 0.7 > 0.1 > levels["hard"].value


def test_longer_agrees_with_itself_in_both_games():
    found = judged("llmbar", "longer").methods[0].figures
    assert found["games"]["agreement"].value > 0.97  # but for pairs of equal length
    assert found["sections"]["Neighbor"].value < 0.15 < 0.5 < found["sections"]["Natural"].value


def test_longer_is_what_arena_voters_like():
    # NaiveVerbosity has 59.8% on PPE's 16,038 votes; these are 350 of an earlier dump.
    figure = judged("ppe-preference", "longer").figure("greedy")
    assert figure is not None and figure.low < 0.598 < figure.high + 0.03


def test_pandalm_holds_a_third_class():
    _, records = load("pandalm")
    classes = collections.Counter(record.labels for record in records)
    assert classes == {(1.0, 0.0): 422, (0.0, 1.0): 472, (0.0, 0.0): 105}


def test_realmistake_is_never_written(tmp_path, capsys):
    _, records = load("realmistake")
    argv = ["--bench", "realmistake", "--data", str(DATA), "--judge", "random", "-k", "2"]
    evaluate.main([*argv, "--resamples", "50", "--output", str(tmp_path)])
    written = [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    written.append(capsys.readouterr().out)
    for record in records[::50]:
        for text in (record.query[-80:], record.responses[0][:80]):
            part = json.dumps(text)[1:-1]
            assert not any(part in one or text in one for one in written), record.id
    cells = collections.Counter(record.domain for record in records)
    assert sorted(cells.values()) == [140] * 3 + [160] * 3
    share = sum(record.labels[0] for record in records) / len(records)
    assert 1 - share == pytest.approx(0.72, abs=0.01)


def test_verifiable_solutions():
    """GSM8K's four solutions a question, as pairs and one by one."""
    benchmark = get_benchmark("ppe-correctness")
    folder = locate(benchmark, DATA, None)
    records = benchmark.load(folder)
    assert len(records) == 2429
    figure = assess(benchmark, records, judge_rows("random", records, k=2), judge="random")
    value = figure.figure("greedy")
    assert value is not None and value.low < 0.5 < value.high
    rules = Rules(form="single")
    single = benchmark.load(folder, rules=rules)
    assert len(single) == 4 * 1319
    rows = judge_rows("random", single, k=0)
    found = assess(benchmark, single, rows, judge="random", rules=rules, resamples=200)
    # Correct shares of the four: 21.7, 39.0, 34.7, 56.3 %: what drawing one gives, at any K.
    curve = found.methods[0].figures["best of K"]
    assert curve["K=1"].value == pytest.approx(np.mean([0.217, 0.390, 0.347, 0.563]), abs=0.001)
    assert curve["K=4"].low < curve["K=1"].value < curve["K=4"].high
