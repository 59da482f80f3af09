"""The evaluation at the end of the pipeline, from critiques and scalar scores to its summary."""

from __future__ import annotations

import dataclasses
import json
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from grm_jax.benchmarks import synthetic
from grm_jax.critique import Template
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.synthetic_files import write_world
from grm_jax.scoring.judges import judge_rows
from grm_jax.scoring.scalar_scores import ScalarScores, read_scalar_scores
from grm_jax.training.final_evaluation import SCALAR, summarise

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "rft", "rl")


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> list[Preference]:
    folder = tmp_path_factory.mktemp("final") / "world"
    write_world(folder, WorldConfig(cold_start=4, train=4, fresh=60, shifted=20))
    return list(synthetic.BENCHMARK.load(folder))


def summarised(heldout: list[Preference], directory: Path, threshold: float | None) -> dict:
    """The summary of random judges beside a scalar RM that is right nine times in ten."""
    directory.mkdir()
    fresh = [record for record in heldout if record.domain == synthetic.FRESH]
    shifted = [record for record in heldout if record.domain != synthetic.FRESH]
    names = dataclasses.asdict(TemplateConfig("compact", "compact_single", "compact_meta"))
    templates = Templates(**{name: Template.load(value) for name, value in names.items()})
    rng = np.random.default_rng(0)
    scores = {}
    for record in heldout:
        right = 1 if rng.random() < 0.9 else -1
        scores[record.id] = tuple(3 * right * (label - 0.5) for label in record.labels)
    drawn = {stage: judge_rows("random", fresh, k=8, seed=i) for i, stage in enumerate(STAGES)}
    return summarise(
        types.SimpleNamespace(templates=templates),  # pyright: ignore[reportArgumentType]
        drawn,
        ScalarScores(scores, threshold, "digest"),
        judge_rows("random", shifted, k=8),
        fresh,
        shifted,
        directory,
    )


def test_the_scalar_rm_stands_alone_and_beside_the_votes(heldout, tmp_path):
    summary = summarised(heldout, tmp_path / "evaluation", 0.0)
    figures = summary["figures"]
    alone = figures[SCALAR]["greedy"]["value"]
    assert 0.75 < alone < 1
    for stage in ("SFT", "RFT", "RL"):
        assert figures[stage]["scalar"]["value"] == alone
        assert figures[stage]["hybrid@8"]["value"] > figures[stage]["vote@8"]["value"] + 0.2
    differences = summary["differences"]
    for name, one, other in (
        ("RL: hybrid@8 over vote@8", "hybrid@8", "vote@8"),
        ("RL: hybrid@8 over the scalar RM", "hybrid@8", "scalar"),
    ):
        wanted = figures["RL"][one]["value"] - figures["RL"][other]["value"]
        assert differences[name]["value"] == pytest.approx(wanted)
    assert set(summary["shifted"]) == {"combinations", "operands"}
    for shown in summary["shifted"].values():
        assert shown["scalar"]["value"] > 0.6
        assert shown["hybrid@8"]["value"] > shown["vote@8"]["value"]
    table = (tmp_path / "evaluation" / "table.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| model"))
    assert header.endswith("| hybrid@8 |")
    kept = read_scalar_scores(tmp_path / "evaluation" / "scalar.json")
    assert set(kept.scores) == {record.id for record in heldout} and kept.threshold == 0
    assert json.loads((tmp_path / "evaluation" / "summary.json").read_text()) == summary


def test_without_a_threshold_the_scalar_rm_judges_no_single_responses(heldout, tmp_path):
    """Its figures are then of other records than those of votes, and are not subtracted."""
    summary = summarised(heldout, tmp_path / "evaluation", None)
    assert "RL: hybrid@8 over vote@8" in summary["differences"]
    assert not any("scalar" in name for name in summary["differences"])
    assert 0.75 < summary["figures"][SCALAR]["greedy"]["value"] < 1
    notes = json.loads((tmp_path / "evaluation" / "results.json").read_text())["notes"]
    singles = sum(r.domain == synthetic.FRESH and len(r.responses) == 1 for r in heldout)
    assert any(f"scalar: {singles} single responses do not count" in note for note in notes)


def test_seeds_of_earlier_versions_still_make_a_table():
    seeds = runpy.run_path(str(ROOT / "experiments" / "spct" / "seeds.py"))
    table = seeds["table"]
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    old = {
        "figures": {"RL": {"vote@32": figure}},
        "differences": {"a": figure},
        "meta_rm": {"auc": 0.5, "auc_within_item": 0.5},
        "audit": {stage: {"false_alarm_rate": 0.1} for stage in STAGES},
        "shifted": {name: {"vote@32": figure} for name in ("combinations", "operands")},
    }
    more = {"vote@32": figure, "hybrid@32": figure, "scalar": figure}
    new = old | {
        "figures": {"RL": more},
        "differences": {"a": figure, "b": figure},
        "shifted": {name: more for name in ("combinations", "operands")},
    }
    both = table({"0": old, "1": new})
    heads, row = (
        [
            cell.strip()
            for cell in next(x for x in both.splitlines() if x.startswith(start)).split("|")
        ]
        for start in ("| model", "| RL |")
    )
    cells = dict(zip(heads, row, strict=True))
    assert (cells["vote@32"], cells["hybrid@32"]) == ("50.0 (50.0 to 50.0)", "-")
    assert "| b | - |" in both and "| RL, hybrid@32 on unseen operands | - |" in both
    newer = table({"0": new})
    assert "| b | 50.0 (50.0 to 50.0) |" in newer
    assert "| the scalar RM on unseen operands | 50.0 (50.0 to 50.0) |" in newer
