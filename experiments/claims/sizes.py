"""Training against inference (Figure 4b): three sizes of the model, and 1 to 32 critiques of each.

SFT, RFT and RL of a model of half and of twice the width, from the same files, beside the recipe's.
FLOPs of a verdict are those of its prompts and critiques; FLOPs of training are those of the
gradient steps up to RL, without the sampling of RFT and RL. The other sizes have the recipe's
learning rates, which were not tuned for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import evidence
import flops
import hybrid
import numpy as np
import paired
from claim import Claim, Found, line_picture
from evidence import Judged
from matplotlib.figure import Figure
from roads import STAGES, Road

from grm_jax.data.critiques import read_critiques

STAGE = "rl"
USUAL = "tiny"
OTHERS = ("tiny_half", "tiny_double")
SIZES = ("tiny_half", USUAL, "tiny_double")


def runs(road: Road) -> None:
    if road.settings.size != USUAL:
        return  # another size is another pretrained model
    road.pipeline()
    for size in OTHERS:
        road.judged(road.other_size(size) / STAGE)


def _run(road: Road, size: str) -> Path:
    return road.directory if size == USUAL else road.other_size(size)


def _file(road: Road, size: str) -> Path:
    return road.samples(STAGE) if size == USUAL else road.judged(_run(road, size) / STAGE)


def _judged(road: Road, size: str) -> Judged:
    return evidence.read_samples(road.records(), _file(road, size), None, road.settings.k)


def read(roads: Sequence[Road]) -> Found:
    if roads[0].settings.size != USUAL:
        return Found("Only on the embedded world: another size is another pretrained model.", {})
    most = roads[0].settings.k
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    found = {size: [_judged(road, size) for road in roads] for size in SIZES}
    credits = {size: evidence.credits(seeds, ks) for size, seeds in found.items()}
    figures = paired.estimates(credits)
    prompt, _ = hybrid.lengths(roads[0])
    costs, rows = {}, []
    for size in SIZES:
        base = _run(roads[0], size)
        records = sum(len(group.records) for group in found[size][0])
        critique = float(np.mean([row.tokens for row in read_critiques(_file(roads[0], size))]))
        costs[size] = {
            k: flops.judging(base / STAGE, found[size][0], prompt, critique, k) / records
            for k in ks
        }
        trained = sum(flops.training(base / stage) for stage in STAGES[: STAGES.index(STAGE) + 1])
        rows.append(
            [
                size, f"{flops.parameters(base / STAGE) / 1e6:.2f}", f"{trained / 1e12:.1f}",
                f"{costs[size][1] / 1e6:.0f}", *(figures[size][k].cell() for k in ks),
            ]
        )  # fmt: skip
    tests = {}
    for small, large in itertools.pairwise(SIZES):
        for k in ks:
            # Votes that cost about one critique of the larger model, or less; and the most votes.
            if k == most or (k > 1 and costs[small][k] <= costs[large][1] * 1.1):
                tests[f"{small}, {k}, against {large}, 1"] = paired.difference(
                    credits[small][k], credits[large][1]
                )
        tests[f"{large} against {small}, {most} each"] = paired.difference(
            credits[large][most], credits[small][most]
        )
        tests[f"{large} against {small}, 1 each"] = paired.difference(
            credits[large][1], credits[small][1]
        )
    text = "\n".join(
        [
            f"RL's model on held-out records with two responses or more, mean of {len(roads)} "
            "seeds in percent with a 95% t interval; votes of k critiques. FLOPs of the first "
            "seed.\n",
            paired.table(
                ["size", "parameters, 10^6", "training, 10^12 FLOPs",
                 "a verdict of one critique, 10^6 FLOPs", *(f"k = {k}" for k in ks)],
                rows,
            ),
            paired.tests_table(tests),
        ]
    )  # fmt: skip
    numbers = {
        "accuracy": paired.as_json(figures),
        "flops of a verdict": {
            size: {str(k): cost for k, cost in by_k.items()} for size, by_k in costs.items()
        },
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers, _picture(figures, costs))


def _picture(
    figures: dict[str, dict[int, paired.Estimate]], costs: dict[str, dict[int, float]]
) -> Figure:
    picture, axes = line_picture(x="FLOPs of a verdict", y="accuracy, %")
    for size, by_k in figures.items():
        x = np.asarray([costs[size][k] for k in by_k])
        axes.plot(x, [e.mean for e in by_k.values()], marker="o", markersize=3, label=size)
    axes.set_xscale("log")
    axes.legend(fontsize=8)
    return picture


CLAIM = Claim(
    "sizes",
    "Are more critiques of a small model worth a larger model?",
    runs,
    read,
)
