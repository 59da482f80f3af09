"""Accuracy against total compute."""

from __future__ import annotations

import compute
import evidence
import flops
import hybrid
import pytest
from roads import Road, Settings

from grm_jax.data.critiques import Critique, write_critiques
from grm_jax.data.preferences import Preference

K = 4
NEEDED = {"sft": 5.0, "sft-x2": 10.0, "scalar_rm": 2.0, "scalar-x2": 4.0, "scalar-x4": 8.0}
NEEDED |= {"scalar-base-x4": 8.0, "scalar-base-x7": 14.0}


def records(kind):
    turns = ({"role": "user", "content": "q"},)
    return [Preference(f"{kind}{i}", turns, ("a", "b"), (1.0, 0.0)) for i in range(10)]


@pytest.fixture
def roads(tmp_path, monkeypatch):
    """Critiques of the doubled SFT are right on fresh records and wrong on unseen ones; all others
    tie. Scalar RMs are right where they start from random weights."""
    monkeypatch.setattr(
        Road, "records", lambda self, shifted=False: records(("fresh", "unseen")[shifted])
    )
    monkeypatch.setattr(Road, "branch", lambda self, name, *_: tmp_path / name)

    def judged(self, stage, *, temperature):
        assert temperature == 0.5
        name = stage.parent.name if stage.parent.name == "sft-x2" else "sft"
        right = {"fresh": (9.0, 1.0), "unseen": (1.0, 9.0)}
        rows = [
            Critique(r.id, i, (0, 1), right[kind] if name == "sft-x2" else (5.0, 5.0), None, "stop",
                     tokens=30)
            for kind in right for r in records(kind) for i in range(K)
        ]  # fmt: skip
        write_critiques(tmp_path / f"{name}.jsonl", rows)
        return tmp_path / f"{name}.jsonl"

    def scalar(run, found):
        return {r.id: (1.0, 0.0) if "base" in run.name else (0.0, 0.0) for r in found}

    def training(stage):
        name = stage.parent.name
        return 1e12 * NEEDED[name if name in NEEDED else stage.name]

    monkeypatch.setattr(Road, "judged", judged)
    monkeypatch.setattr(evidence, "scalar_scores", scalar)
    monkeypatch.setattr(flops, "training", training)
    monkeypatch.setattr(flops, "parameters", lambda stage: 1e6)
    monkeypatch.setattr(hybrid, "lengths", lambda road: (20.0, 99.0))
    monkeypatch.setattr(hybrid, "scalar_tokens", lambda road: 5e4)
    return [Road(Settings(runs=tmp_path, k=K), seed) for seed in (0, 1)]


def test_every_judge_has_its_price_and_its_accuracy(roads):
    figures = compute.read(roads).figures
    judging = 2 * 1e6 * 10 * (2 * 20 + 4 * 30)  # two orders, four critiques
    prices = {
        "SFT, votes at 0.5, k = 4": 5e12 + judging,
        "SFT, 2 times the steps, votes at 0.5, k = 4": 10e12 + judging,
        "scalar RM from SFT's weights": 5e12 + 2e12 + 1e11,
        "scalar RM from SFT's weights, 4 times the steps": 5e12 + 8e12 + 1e11,
        "scalar RM from random weights, 7 times the steps": 14e12 + 1e11,
    }
    for name, price in prices.items():
        assert figures["flops"][name] == pytest.approx(price), name
    accuracy = {
        name: {k: v["mean"] for k, v in by.items()} for name, by in figures["accuracy"].items()
    }
    assert accuracy["SFT, votes at 0.5, k = 4"] == {"fresh": 50.0, "unseen": 50.0}
    best = "SFT, 2 times the steps, votes at 0.5, k = 4"
    assert accuracy[best] == {"fresh": 100.0, "unseen": 0.0}
    assert accuracy["scalar RM from random weights, 4 times the steps"]["unseen"] == 100.0
    assert figures["unseen against fresh"][best]["mean"] == -100.0
    # Judges of about the same price are compared, of the most critiques.
    near = {
        "scalar RM from SFT's weights, 2 times the steps (10.0 and 9.1)": 50.0,
        "scalar RM from random weights, 4 times the steps (10.0 and 8.1)": 0.0,
    }
    tests = {name: found["mean"] for name, found in figures["differences"].items()}
    assert {name: mean for name, mean in tests.items() if name.endswith("fresh")} == {
        f"{best}, against {name}: fresh": mean for name, mean in near.items()
    }
    assert len(tests) == 4


def test_the_doubled_sft_makes_twice_the_recipes_steps(tmp_path, monkeypatch):
    branches = []
    monkeypatch.setattr(
        Road, "branch", lambda self, name, *options: branches.append((name, options)) or tmp_path
    )
    assert compute._sft(Road(Settings(runs=tmp_path), 0), 2) == tmp_path / "sft"
    Road(Settings(runs=tmp_path), 0).scalar_rm(7, start="base")
    assert (
        branches
        == [
            ("sft-x2", ("sft", "--sft.fitting.steps", "1700")),
            (
                "scalar-base-x7",
                ("scalar_rm", "--scalar-rm.fitting.steps", "3150", "--scalar-rm.start", "base"),
            ),
        ]
        or branches[0][1][0] == "sft"
    )
