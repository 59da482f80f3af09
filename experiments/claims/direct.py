"""What the critique itself is worth: a judge that writes scores alone, and a scalar RM that has not
learnt from critiques.

SFT learns the scores of the teacher's critiques without their text, and RFT and RL follow from its
model. Its votes draw scores; its expected scores are the token-probability judge, which reads the
distribution of each score's token instead. Both cost a verdict as many tokens as there are scores.

The recipe's scalar RM starts from the weights that SFT has taught to write critiques. Another one
starts from random weights, as SFT does, and makes the steps that SFT's FLOPs pay for besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import expected
import flops
import numpy as np
import paired
import voting
from claim import Claim, Found
from roads import Road

STAGES = {"sft": "SFT", "rl": "RL"}
NAME = "direct"
SCRATCH = "scalar RM from random weights"
AS_MUCH = 4  # times the steps of the recipe's scalar RM cost what SFT and it cost together


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # elsewhere it is not known which line of a teacher's text has the scores
    road.pipeline()
    run = _run(road)
    for stage in STAGES:
        road.verdicts(run / stage)
    _scratch(road)


def _run(road: Road) -> Path:
    """The run of SFT, RFT and RL from scores without critiques."""
    road.branch(NAME, "sft", "--instructions", str(road.instructions(NAME, scores_alone)))
    road.branch(NAME, "rft")
    return road.branch(NAME, "rl")


def _scratch(road: Road) -> Path:
    """The run of a scalar RM that starts from random weights."""
    return road.scalar_rm(AS_MUCH, start="base")


def _cost(run: Path, *stages: str) -> float:
    """10^12 FLOPs of the gradient steps of some stages of a run."""
    return sum(flops.training(run / stage) for stage in stages) / 1e12


def scores_alone(text: str) -> str:
    """The last line of the embedded world's critique, with the line break before it: one token."""
    _, mark, scores = text.rpartition("\nScores:")
    if not mark:
        raise ValueError(f"no line of scores at the end of {text!r}")
    return mark + scores


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world, whose critiques end with a line of scores.", {})
    most = roads[0].settings.k
    ks = list(dict.fromkeys((1, min(8, most), most)))
    credits: dict[str, dict[int, list[np.ndarray]]] = {}
    for stage, label in STAGES.items():
        judged = [voting.read_stage(road, stage) for road in roads]
        credits[_critiques(label)] = evidence.credits(judged, ks)
        found = [expected.both(road, _run(road) / stage) for road in roads]
        for kind, which in (("drawn", 0), ("probabilities", 1)):
            credits[_scores(label, kind)] = evidence.credits([both[which] for both in found], ks)
    scalar = [evidence.scalar_accuracy(voting.read_stage(road, "rl")) for road in roads]
    scratch = [evidence.scalar_credits(_scratch(road), road.records()) for road in roads]
    figures = paired.estimates(credits)
    rows = [[name, *(figures[name][k].cell() for k in ks)] for name in credits]
    first = roads[0]
    costs = {
        "scalar RM": _cost(first.directory, "sft", "scalar_rm"),
        SCRATCH: _cost(_scratch(first), "scalar_rm"),
    }
    for name, found in (("scalar RM", scalar), (SCRATCH, scratch)):
        cells = ["" for _ in ks[1:]]
        label = f"{name} ({costs[name]:.1f} x 10^12 FLOPs of training)"
        rows.append([label, paired.over_seeds(found).cell(), *cells])
    tests = {f"{SCRATCH}, against the recipe's scalar RM": paired.difference(scratch, scalar)}
    for label in STAGES.values():
        for kind in ("drawn", "probabilities"):
            for k in ks:
                tests[f"{_scores(label, kind)}, against {_critiques(label)}, k = {k}"] = (
                    paired.difference(
                        credits[_scores(label, kind)][k], credits[_critiques(label)][k]
                    )
                )
    for k in ks:
        tests[f"{_scores('RL', 'probabilities')}, k = {k}, against the scalar RM"] = (
            paired.difference(credits[_scores("RL", "probabilities")][k], scalar)
        )
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval. k draws of a record see its responses in balanced orders.\n",
            paired.table(["judge", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
        ]
    )
    numbers = {
        "accuracy": paired.as_json(figures),
        "scalar": paired.over_seeds(scalar).as_json(),
        SCRATCH: paired.over_seeds(scratch).as_json(),
        "training FLOPs": {name: cost * 1e12 for name, cost in costs.items()},
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers)


def _critiques(label: str) -> str:
    return f"{label}, critiques"


def _scores(label: str, kind: str) -> str:
    return f"{label}, scores alone, {kind}"


CLAIM = Claim(
    "direct",
    "What is the critique worth, to the judge that writes it, and to a scalar RM that learnt it?",
    runs,
    read,
)
