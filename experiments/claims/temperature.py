"""How many critiques, and at which temperature: 1 to 64 critiques, at temperatures from 0.3 to 1.3.

The paper votes at temperature 0.5 (Tables 3 and 6), and stops at 32 critiques (Figure 4a). Votes at
temperature 1, at which the embedded world's recipes judge and RL's rollouts are drawn, go up to 64
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found, line_picture
from evidence import Judged
from matplotlib.figure import Figure
from roads import Road
from voting import STAGES

USUAL = 1.0
OTHERS = (0.3, 0.5, 0.7, 1.3)
PAPER = 0.5


def runs(road: Road) -> None:
    road.pipeline()
    for stage in STAGES:
        for temperature in (USUAL, *OTHERS):
            votes_at(road, stage, temperature)


def votes_at(road: Road, stage: str, temperature: float) -> Path:
    """The critiques of a stage's model at a temperature."""
    k = _most(road, temperature)
    return road.judged(road.directory / stage, k=k, temperature=temperature)


def _most(road: Road, temperature: float) -> int:
    """The critiques of a record: twice as many at the usual temperature."""
    return road.settings.k * (2 if temperature == USUAL else 1)


def judged(road: Road, stage: str, temperature: float) -> Judged:
    """What they say of the held-out records."""
    file = votes_at(road, stage, temperature)
    return evidence.read_samples(road.records(), file, None, _most(road, temperature))


def read(roads: Sequence[Road]) -> Found:
    most = _most(roads[0], USUAL)
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    credits: dict[str, dict[int, list[np.ndarray]]] = {}
    for stage, label in STAGES.items():
        for temperature in sorted((USUAL, *OTHERS)):
            found = [judged(road, stage, temperature) for road in roads]
            some = [k for k in ks if k <= _most(roads[0], temperature)]
            credits[_name(label, temperature)] = evidence.credits(found, some)
    figures = paired.estimates(credits)
    rows = [
        [name, *(by_k[k].cell() if k in by_k else "" for k in ks)] for name, by_k in figures.items()
    ]
    tests = {}
    for label in STAGES.values():
        usual = credits[_name(label, USUAL)]
        tests[f"{label}: {most} against {most // 2} critiques"] = paired.difference(
            usual[most], usual[most // 2]
        )
        for temperature in OTHERS:
            other = credits[_name(label, temperature)]
            for k in dict.fromkeys((1, min(8, most // 2), most // 2)):
                tests[f"{label}, k = {k}: temperature {temperature:g} against {USUAL:g}"] = (
                    paired.difference(other[k], usual[k])
                )
    scalar = [evidence.scalar_accuracy(voting.read_stage(road, "rl")) for road in roads]
    for label in STAGES.values():
        for k in dict.fromkeys((min(8, most // 2), most // 2)):
            votes = credits[_name(label, PAPER)][k]
            for temperature in (PAPER, USUAL) if label != STAGES["rl"] else ():
                test = f"{label}, {k} at {PAPER:g} against RL's at {temperature:g}"
                rl = credits[_name(STAGES["rl"], temperature)][k]
                tests[test] = paired.difference(votes, rl)
        tests[f"{label}, {most // 2} at {PAPER:g} against the scalar RM"] = paired.difference(
            credits[_name(label, PAPER)][most // 2], scalar
        )
    text = "\n".join(
        [
            f"Votes on held-out records with two responses or more, mean of {len(roads)} seeds in "
            "percent with a 95% t interval.\n",
            paired.table(["judge, temperature", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
        ]
    )
    numbers = {"accuracy": paired.as_json(figures), "differences": paired.as_json(tests)}
    return Found(text, numbers, _picture(figures))


def _name(label: str, temperature: float) -> str:
    return f"{label}, {temperature:g}"


def _picture(figures: dict[str, dict[int, paired.Estimate]]) -> Figure:
    """A colour a model, a style a temperature."""
    picture, axes = line_picture(x="critiques", y="accuracy, %")
    styles = dict(zip(sorted((USUAL, *OTHERS)), (":", "-.", "--", "-", "-"), strict=True))
    for color, label in enumerate(STAGES.values()):
        for temperature, style in styles.items():
            by_k = figures[_name(label, temperature)]
            axes.plot(
                list(by_k), [e.mean for e in by_k.values()], style, color=f"C{color}",
                alpha=0.4 if temperature > USUAL else 1.0, label=_name(label, temperature),
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7, title="judge, temperature", ncols=len(STAGES), loc="lower right")
    return picture


CLAIM = Claim(
    "temperature",
    "How many critiques, and at which temperature?",
    runs,
    read,
)
