"""RL and the ceiling: what RL does to the spread of critiques, and what keeps it.

RL is run again from the same RFT model with other rewards and penalties. Read from the rollouts of
each run: the entropy of a token, and how many different principles a record's critiques name; from
the critiques of held-out records: one critique, votes, ties, and to how many independent critiques
they amount (Kish).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from matplotlib.figure import Figure
from roads import Road

# Name -> options of the rl stage. The recipe: tie expected, KL 0.02, groups of 8.
VARIANTS: dict[str, tuple[str, ...]] = {
    "the paper's tie rule": ("--rl.tie", "paper"),
    "no KL penalty": ("--rl.kl-coef", "0"),
    "KL 0.08": ("--rl.kl-coef", "0.08"),
    "rare right ones": ("--rl.rare", "0.5"),
    "votes as well": ("--rl.vote", "2"),
    "votes and rare": ("--rl.vote", "2", "--rl.rare", "0.5"),
    "two orders": ("--rl.orders", "2"),
}
GROUPS = "groups of 16"  # from fewer records, so that a step has as many rollouts
RECIPE = "the recipe"


def runs(road: Road) -> None:
    road.pipeline()
    for name in (*VARIANTS, GROUPS):
        road.judged(_stage(road, name))


def _stage(road: Road, name: str) -> Path:
    """The directory of the rl stage of a variant."""
    if name == RECIPE:
        return road.directory / "rl"
    folder = "rl-" + name.replace(" ", "-").replace("'", "").replace(".", "")
    arguments = "group=16" if name == GROUPS else ""
    return road.branch(folder, "rl", *VARIANTS.get(name, ()), arguments=arguments) / "rl"


def _judged(road: Road, name: str) -> Judged:
    if name == RECIPE:
        return voting.read_stage(road, "rl")
    records = road.records()
    return evidence.read_samples(records, road.judged(_stage(road, name)), None, road.settings.k)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = tuple(dict.fromkeys((1, min(8, most), most)))
    found = {
        "RFT, before RL": [voting.read_stage(road, "rft") for road in roads],
        **{name: [_judged(road, name) for road in roads] for name in (RECIPE, *VARIANTS, GROUPS)},
    }
    credits = {name: evidence.credits(seeds, ks) for name, seeds in found.items()}
    start = credits["RFT, before RL"]
    rows, tests = [], {}
    for name, seeds in found.items():
        entropy, named = "", ""
        if name != "RFT, before RL":
            entropy, named = _spread([_stage(road, name) for road in roads])
            tests[f"{name}: {most} votes against RFT's"] = paired.difference(
                credits[name][most], start[most]
            )
            if name != RECIPE:
                for k in (1, most):
                    tests[f"{name}: votes of {k} against the recipe's"] = paired.difference(
                        credits[name][k], credits[RECIPE][k]
                    )
        rows.append(
            [
                name,
                *(paired.over_seeds(credits[name][k]).cell() for k in ks),
                f"{np.mean([voting.effective(judged) for judged in seeds]):.1f}",
                paired.over_seeds([voting.any_right(judged) for judged in seeds]).cell(),
                entropy,
                named,
            ]
        )
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval. Entropy of a token in nats and different sets of principles "
            "among the rollouts of a group: means over the last ten steps.\n",
            paired.table(
                ["RL", *(f"k = {k}" for k in ks), f"{most} critiques amount to",
                 f"any of {most} right", "entropy", "sets of principles"],
                rows,
            ),
            paired.tests_table(tests),
        ]
    )  # fmt: skip
    figures = {
        "accuracy": paired.as_json(paired.estimates(credits)),
        "differences": paired.as_json(tests),
    }
    return Found(text, figures, _picture(roads))


def _spread(stages: Sequence[Path]) -> tuple[str, str]:
    """(entropy, distinct sets of principles in a group), means over the last ten steps."""
    entropies, named = [], []
    for stage in stages:
        entropies += [row["entropy"] for row in _metrics(stage)[-10:]]
        named.append(np.mean(principles(stage)[-10:]))
    return f"{np.mean(entropies):.2f}", f"{np.mean(named):.1f}"


def _metrics(stage: Path) -> list[dict[str, float]]:
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "entropy" in row]


def principles(stage: Path) -> list[float]:
    """By step: how many different sets of principles the rollouts of a group name, on average."""
    groups: dict[int, dict[tuple[str, tuple[int, ...]], set[str]]] = {}
    with (stage / "rollouts.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found = re.search(r"Criteria:(.*)", row["text"])
            words = " ".join(sorted((found[1] if found else "").split()))
            group = row["example_id"], tuple(row["order"])
            groups.setdefault(row["step"], {}).setdefault(group, set()).add(words)
    return [
        float(np.mean([len(sets) for sets in groups[step].values()])) for step in sorted(groups)
    ]


def _picture(roads: Sequence[Road]) -> Figure:
    picture = Figure(figsize=(9, 3.5))
    left, right = picture.subplots(1, 2)
    for name in (RECIPE, *VARIANTS, GROUPS):
        stages = [_stage(road, name) for road in roads]
        entropy = np.mean([[row["entropy"] for row in _metrics(stage)] for stage in stages], axis=0)
        left.plot(paired.smooth(entropy), label=name)
        right.plot(paired.smooth(np.mean([principles(stage) for stage in stages], axis=0)))
    left.set_ylabel("entropy of a token, nats")
    right.set_ylabel("sets of principles in a group")
    for axes in (left, right):
        axes.set_xlabel("step of RL")
    left.legend(fontsize=7)
    picture.tight_layout()
    return picture


CLAIM = Claim(
    "ceiling",
    "Why do votes gain less after RL, and which reward keeps what they gain?",
    runs,
    read,
)
