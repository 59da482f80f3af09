"""The meta RM (section 4): what it can tell apart, and which meta RM makes votes better.

A critique whose top score is shared is wrong by Eq. (10), and has no vote between the responses
that share it. So a meta RM earns its place by telling right from wrong among the other critiques.
It is trained again with other labels, and from the scalar RM's weights. Beside these stands the
scalar RM itself, which says of a critique how probably its winner is the better response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Group, Judged
from roads import Road

from grm_jax.scoring.statistics import mean_auc_within

# Name -> options of the meta_rm stage.
VARIANTS: dict[str, tuple[str, ...]] = {
    "ties at their expectation": ("--meta-rm.tie", "expected"),
    "without ties": ("--meta-rm.tie", "leave-out"),
    "from the scalar RM": ("--meta-rm.start", "scalar_rm"),
    "from the scalar RM, without ties": (
        "--meta-rm.start", "scalar_rm", "--meta-rm.tie", "leave-out",
    ),
}  # fmt: skip
RECIPE = "the recipe's"
SCALAR = "the scalar RM instead"


def runs(road: Road) -> None:
    road.pipeline()
    for name in VARIANTS:
        _samples(road, name)


def _samples(road: Road, name: str) -> Path:
    folder = road.branch(
        f"meta-{name.replace(' ', '-').replace(',', '')}", "meta_rm", *VARIANTS[name]
    )
    return road.judged(road.directory / "rl", meta=folder)


def _judged(road: Road, name: str) -> Judged:
    if name in (RECIPE, SCALAR):
        return voting.read_stage(road, "rl")
    records = road.records()
    scalar = evidence.scalar_scores(road.directory, records)
    return evidence.read_samples(records, _samples(road, name), scalar, road.settings.k)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    few = min(8, most)
    plain = evidence.credits([voting.read_stage(road, "rl") for road in roads], (few, most))
    rows, tests = [], {}
    figures: dict[str, paired.Estimate] = {}
    for name in (RECIPE, *VARIANTS, SCALAR):
        found = [_judged(road, name) for road in roads]
        if name == SCALAR:
            found = [[_by_scalar(group) for group in judged] for judged in found]
        row = [name]
        for kind in ("ties", "decisive"):
            row.append(paired.over_seeds([_auc(judged, kind) for judged in found]).cell())
        for k in (few, most):
            methods: dict[str, evidence.Method] = {
                "guided": evidence.guided, "weighted": evidence.weighted
            }  # fmt: skip
            for how, method in methods.items():
                credits = [evidence.accuracy(judged, k, method) for judged in found]
                figures[f"{name}, {how}, {k}"] = paired.over_seeds(credits)
                row.append(figures[f"{name}, {how}, {k}"].cell())
                test = paired.difference(credits, plain[k])
                tests[f"{name}: {how} against plain votes of {k}"] = test
        rows.append(row)
    base = [
        "no meta RM",
        "",
        "",
        *(cell for k in (few, most) for cell in (paired.over_seeds(plain[k]).cell(), "")),
    ]
    text = "\n".join(
        [
            f"RL's critiques of held-out records with two responses or more, mean of {len(roads)} "
            "seeds with a 95% t interval. ROC-AUC (x100) within records: right critiques against "
            "those whose top score is shared (ties), and against wrong ones without (decisive).\n",
            paired.table(
                ["meta RM", "AUC, ties", "AUC, decisive",
                 *(f"{how}@{k}" for k in (few, most) for how in ("guided", "weighted"))],
                [base, *rows],
            ),
            paired.tests_table(tests),
        ]
    )  # fmt: skip
    numbers = {"accuracy": paired.as_json(figures), "differences": paired.as_json(tests)}
    return Found(text, numbers)


def _by_scalar(group: Group) -> Group:
    """The group with half of the scalar RM's margin for a critique's winner as its meta score."""
    return dataclasses.replace(group, meta=evidence.margin(group.scores, group.scalar) / 2)


def _auc(judged: Judged, kind: str) -> float:
    """Of right critiques against ties, or against the wrong ones among decisive critiques."""
    scores, labels, ids = [], [], []
    for group in judged:
        chosen = group.right | (group.tied if kind == "ties" else group.usable & ~group.tied)
        rows, _ = np.nonzero(chosen)
        scores += group.meta[chosen].tolist()
        labels += group.right[chosen].tolist()
        ids += [group.records[row].id for row in rows]
    return mean_auc_within(scores, labels, ids)


CLAIM = Claim(
    "guidance",
    "Does a meta RM make votes better, and if not, why?",
    runs,
    read,
)
