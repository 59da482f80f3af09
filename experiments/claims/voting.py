"""Inference-time scaling (Figure 4a, Tables 3 and 5): accuracy against the number of critiques.

Of the SFT, RFT and RL models: plain votes, votes guided and weighted by the meta RM (of RL's
critiques, for which it was trained), and how far any filter could get: whether any of k critiques
is right, and to how many independent ones the k amount (Kish).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import evidence
import numpy as np
import paired
from claim import Claim, Found, line_picture
from evidence import Group, Judged
from matplotlib.figure import Figure
from roads import Road

STAGES = {"sft": "SFT", "rft": "RFT", "rl": "RL"}


def runs(road: Road) -> None:
    road.pipeline()


@functools.cache
def read_stage(road: Road, stage: str, *, shifted: bool = False) -> Judged:
    """What a stage's model said of the held-out records, with the scalar RM's scores.

    Args:
      shifted: of those that training has not seen the like of.
    """
    records = road.records(shifted=shifted)
    scalar = evidence.scalar_scores(road.directory, records)
    file = road.samples(stage, shifted=shifted)
    return evidence.read_samples(records, file, scalar, road.settings.k)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = [2**i for i in range(most.bit_length()) if 2**i <= most]
    found = {label: [read_stage(road, stage) for road in roads] for stage, label in STAGES.items()}
    credits: dict[str, dict[int, list[np.ndarray]]] = {}
    for label, seeds in found.items():
        methods = {"votes": evidence.plain}
        if label == "RL":
            methods |= {"guided": evidence.guided, "weighted": evidence.weighted}
        for name, method in methods.items():
            credits[f"{label}, {name}"] = evidence.credits(seeds, ks, method)
    scalar = [evidence.scalar_accuracy(judged) for judged in found["RL"]]
    names = list(credits)
    figures = paired.estimates(credits)
    baseline = paired.over_seeds(scalar)
    rows = [[name, *(figures[name][k].cell() for k in ks)] for name in names]
    rows.append(["scalar RM", baseline.cell(), *("" for _ in ks[1:])])
    tests = {
        f"{name}: {ks[-1]} against 1": paired.difference(by_k[ks[-1]], by_k[1])
        for name, by_k in credits.items()
    }
    rl = credits["RL, votes"]
    for k in dict.fromkeys((min(8, ks[-1]), ks[-1])):
        for name in ("guided", "weighted"):
            tests[f"RL: {name} against plain votes of {k}"] = paired.difference(
                credits[f"RL, {name}"][k], rl[k]
            )
        tests[f"RL against RFT, votes of {k}"] = paired.difference(rl[k], credits["RFT, votes"][k])
    tests["RL against RFT, one critique"] = paired.difference(rl[1], credits["RFT, votes"][1])
    for label in STAGES.values():
        tests[f"{label}, votes of {ks[-1]} against the scalar RM"] = paired.difference(
            credits[f"{label}, votes"][ks[-1]], scalar
        )
    limits = [
        [
            label,
            paired.over_seeds([any_right(judged) for judged in seeds]).cell(),
            paired.over_seeds([evidence.by_record(judged, _tied) for judged in seeds]).cell(),
            f"{np.mean([effective(judged) for judged in seeds]):.1f}",
        ]
        for label, seeds in found.items()
    ]
    text = "\n".join(
        [
            f"Accuracy on held-out records with two responses or more, in percent: the mean of "
            f"{len(roads)} seeds with a 95% t interval.\n",
            paired.table(["model, method", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
            paired.table(
                ["model", f"any of {most} right", "ties among critiques",
                 f"{most} critiques amount to"],
                limits,
            ),
        ]
    )  # fmt: skip
    numbers = {
        "accuracy": paired.as_json(figures),
        "scalar": baseline.as_json(),
        "differences": paired.as_json(tests),
    }
    return Found(text, numbers, _picture(figures, baseline, ks))


def any_right(judged: Judged) -> np.ndarray:
    """Whether any critique of a record is right, group after group."""
    return evidence.by_record(judged, lambda group: np.asarray(group.right.any(axis=1)))


def _tied(group: Group) -> np.ndarray:
    """[R] the share of a record's readable critiques whose top score is shared."""
    return group.tied.sum(axis=1) / np.maximum(group.usable.sum(axis=1), 1)


def effective(judged: Judged) -> float:
    """Kish's effective number of critiques: K / (1 + (K - 1) rho), with rho the correlation of
    being right between two critiques of the same record."""
    right = np.concatenate([group.right for group in judged]).astype(float)  # [R, K]
    samples, mean = right.shape[1], right.mean()
    # An unbiased estimate of the variance between records.
    within = right.var(axis=1, ddof=1).mean()
    between = max(right.mean(axis=1).var(ddof=1) - within / samples, 0.0)
    rho = between / (mean * (1.0 - mean))
    return samples / (1.0 + (samples - 1) * rho)


def _picture(
    figures: dict[str, dict[int, paired.Estimate]], scalar: paired.Estimate, ks: Sequence[int]
) -> Figure:
    picture, axes = line_picture(x="critiques of a record", y="accuracy, %")
    for name, by_k in figures.items():
        dashed = "--" if "guided" in name or "weighted" in name else "-"
        axes.plot(ks, [by_k[k].mean for k in ks], dashed, marker="o", markersize=3, label=name)
    axes.axhline(scalar.mean, color="grey", linestyle=":", label="scalar RM")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.legend(fontsize=8)
    return picture


CLAIM = Claim(
    "voting",
    "Does accuracy grow with the number of critiques, and does the meta RM make it grow faster?",
    runs,
    read,
    quick=True,
)
