"""The judges in one picture: the paper's, and what is better here, against the number of critiques.

Votes of the RL model, and the same votes guided by the meta RM, are the paper's judges. Beside them
stand votes of the RFT model, the sum of these with the scalar RM's scores (its weight is chosen on
the other half of the records), votes of the RL and SFT models at the temperature at which the paper
votes (all others are drawn at the recipe's, 1 on the embedded world), and the scalar RM alone, as
the recipe trains it and for twice the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import evidence
import hybrid
import numpy as np
import paired
import temperature
import voting
from claim import Claim, Found, line_picture
from evidence import Judged
from matplotlib.figure import Figure
from roads import Road

PAPER = ("RL, votes (the paper's judge)", "RL, votes guided by the meta RM (the paper's best)")
COLDER = {
    stage: f"{voting.STAGES[stage]}, votes at temperature {temperature.PAPER:g}"
    for stage in ("rl", "sft")
}
TWICE = 2  # times the recipe's steps of the scalar RM

Curve = dict[int, list[np.ndarray]]  # k -> credits [R] of each seed


def runs(road: Road) -> None:
    road.pipeline()
    for stage in COLDER:
        temperature.votes_at(road, stage, temperature.PAPER)
    road.scalar_rm(TWICE)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]

    def curve(stage: str, credits: Callable[[Judged, int], np.ndarray]) -> Curve:
        return {k: [credits(voting.read_stage(road, stage), k) for road in roads] for k in ks}

    curves = {
        PAPER[0]: curve("rl", lambda judged, k: evidence.accuracy(judged, k, evidence.plain)),
        PAPER[1]: curve("rl", lambda judged, k: evidence.accuracy(judged, k, evidence.guided)),
        "RFT, votes": curve("rft", lambda judged, k: evidence.accuracy(judged, k, evidence.plain)),
        "RFT, votes and scalar RM": curve(
            "rft", lambda judged, k: hybrid.crossed(judged, hybrid.sweep(judged, k))
        ),
    }
    for stage, name in COLDER.items():
        colder = [temperature.judged(road, stage, temperature.PAPER) for road in roads]
        curves[name] = evidence.credits(colder, ks)
    alone = {
        "scalar RM": hybrid.scalar_alone(roads, 1),
        f"scalar RM, {TWICE} times the steps": hybrid.scalar_alone(roads, TWICE),
    }
    shown = paired.estimates(curves)
    lines = {name: paired.over_seeds(values) for name, values in alone.items()}
    rows = [[name, *(by_k[k].cell() for k in ks)] for name, by_k in shown.items()]
    rows += [[name, line.cell(), *("" for _ in ks[1:])] for name, line in lines.items()]
    paper = curves[PAPER[1]][most]
    tests = {
        f"{name}, against the paper's best": paired.difference(values, paper)
        for name, values in {
            f"{PAPER[0]}, {most}": curves[PAPER[0]][most],
            f"RFT, votes and scalar RM, {most}": curves["RFT, votes and scalar RM"][most],
            **{f"{name}, {most}": curves[name][most] for name in COLDER.values()},
            **alone,
        }.items()
    }
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval.\n",
            paired.table(["judge", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
        ]
    )
    numbers = {"accuracy": paired.as_json({**shown, **lines}), "differences": paired.as_json(tests)}
    return Found(text, numbers, _picture(shown, lines, ks))


def _picture(
    curves: dict[str, dict[int, paired.Estimate]],
    lines: dict[str, paired.Estimate],
    ks: Sequence[int],
) -> Figure:
    picture, axes = line_picture(x="critiques of a record", y="accuracy, %")
    picture.set_size_inches(8, 4.2)
    for name, by_k in curves.items():
        style = "-" if name in PAPER else "--"
        axes.plot(ks, [by_k[k].mean for k in ks], style, marker="o", markersize=4, label=name)
    for (name, line), style in zip(lines.items(), (":", "-."), strict=True):
        axes.axhline(line.mean, color="grey", linestyle=style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return picture


CLAIM = Claim(
    "headline",
    "How good are the paper's judges here, and what is better?",
    runs,
    read,
    quick=True,
)
