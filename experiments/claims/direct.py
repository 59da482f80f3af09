"""What the critique itself is worth: a judge that writes scores alone.

SFT learns the scores of the teacher's critiques without their text, and RFT and RL follow from its
model. Its votes draw scores; its expected scores are the token-probability judge, which reads the
distribution of each score's token instead. Both cost a verdict as many tokens as there are scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import expected
import numpy as np
import paired
import voting
from claim import Claim, Found
from roads import Road

STAGES = {"sft": "SFT", "rl": "RL"}
NAME = "direct"


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # elsewhere it is not known which line of a teacher's text has the scores
    road.pipeline()
    run = _run(road)
    for stage in STAGES:
        road.verdicts(run / stage)


def _run(road: Road) -> Path:
    """The run of SFT, RFT and RL from scores without critiques."""
    road.branch(NAME, "sft", "--instructions", str(road.instructions(NAME, scores_alone)))
    road.branch(NAME, "rft")
    return road.branch(NAME, "rl")


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
    figures = paired.estimates(credits)
    rows = [[name, *(figures[name][k].cell() for k in ks)] for name in credits]
    rows.append(["scalar RM", paired.over_seeds(scalar).cell(), *("" for _ in ks[1:])])
    tests = {}
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
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers)


def _critiques(label: str) -> str:
    return f"{label}, critiques"


def _scores(label: str, kind: str) -> str:
    return f"{label}, scores alone, {kind}"


CLAIM = Claim(
    "direct",
    "What is the critique worth, beside scores alone and the probabilities of their tokens?",
    runs,
    read,
)
