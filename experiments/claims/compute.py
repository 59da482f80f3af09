"""Accuracy at equal total compute: does a generative judge beat a scalar head?

The generative judge is the SFT model alone, of once and twice the recipe's steps: votes at
temperature 0.5, at which the paper votes. Beside it scalar RMs of more and more steps: from SFT's
weights, and from random ones. FLOPs are those of training, and of judging the fresh records once.
All of them judge fresh records, and records with operands and combinations that no training record
has.

What they learn from differs: SFT from a teacher's critiques, which have errors, and no label; the
scalar RMs from the true order of the responses of 8,000 records. All scalar RMs have the learning
rate that was chosen for a start from SFT's weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import evidence
import flops
import hybrid
import numpy as np
import paired
from claim import Claim, Found, line_picture
from evidence import Judged
from matplotlib.figure import Figure
from roads import Road

from grm_jax import recipes
from grm_jax.data.critiques import read_critiques
from grm_jax.data.preferences import Preference

TEMPERATURE = 0.5
SFT = (1, 2)  # times the recipe's steps
FROM_SFT = (1, 2, 4)
FROM_RANDOM = (4, 7)  # cost what SFT and 1, and 4, times the steps from its weights cost
KINDS = FRESH, UNSEEN = "fresh", "unseen"
NEAR = (0.8, 1.25)  # FLOPs of a scalar RM, beside a generative judge's, with which it is compared


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A judge at one price.

    Attributes:
      flops: of training and judging, of the first seed.
      credits: by kind of records, then by seed, [R].
    """

    family: str
    name: str
    flops: float
    credits: dict[str, list[np.ndarray]]


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # elsewhere no scalar RM starts from random weights
    road.pipeline()
    for times in SFT:
        _samples(road, times)
    for times in FROM_SFT:
        road.scalar_rm(times, start="sft")
    for times in FROM_RANDOM:
        road.scalar_rm(times, start="base")


def _sft(road: Road, times: int) -> Path:
    """The directory of an SFT stage of `times` the recipe's steps."""
    if times == 1:
        return road.directory / "sft"
    recipe = recipes.load(f"sft.py:{road.settings.size}")
    assert isinstance(recipe, recipes.SFTRecipe)
    steps = str(times * recipe.sft.fitting.steps)
    return road.branch(f"sft-x{times}", "sft", "--sft.fitting.steps", steps) / "sft"


def _samples(road: Road, times: int) -> Path:
    return road.judged(_sft(road, times), temperature=TEMPERATURE)


def _judged(road: Road, times: int, kind: str) -> Judged:
    records, file = _records(road, kind), _samples(road, times)
    return evidence.read_samples(records, file, None, road.settings.k)


def _records(road: Road, kind: str) -> list[Preference]:
    return road.records(shifted=kind == UNSEEN)


def entrants(roads: Sequence[Road]) -> list[Entrant]:
    first, found = roads[0], []
    ks = [2**i for i in range(first.settings.k.bit_length())]
    prompt, _ = hybrid.lengths(first)
    for times in SFT:
        stage = _sft(first, times)
        written = np.mean([row.tokens for row in read_critiques(_samples(first, times))])
        judged = {kind: [_judged(road, times, kind) for road in roads] for kind in KINDS}
        for k in (k for k in ks if k <= first.settings.k):
            spent = flops.training(stage) + flops.judging(
                stage, judged[FRESH][0], prompt, float(written), k
            )
            credits = {
                kind: [evidence.accuracy(seed, k, evidence.plain) for seed in judged[kind]]
                for kind in KINDS
            }
            family = f"SFT{_times(times)}, votes at {TEMPERATURE:g}"
            found.append(Entrant(family, f"{family}, k = {k}", spent, credits))
    scored = flops.reading(first.directory / "scalar_rm", hybrid.scalar_tokens(first))
    families: list[tuple[str, Sequence[int], Callable[[Road, int], Path], float]] = [
        ("scalar RM from SFT's weights", FROM_SFT,
         lambda road, times: road.scalar_rm(times, start="sft"),
         flops.training(first.directory / "sft")),
        ("scalar RM from random weights", FROM_RANDOM,
         lambda road, times: road.scalar_rm(times, start="base"), 0.0),
    ]  # fmt: skip
    for family, steps, of, before in families:
        for times in steps:
            spent = before + flops.training(of(first, times) / "scalar_rm") + scored
            credits = {
                kind: [
                    evidence.scalar_credits(of(road, times), _records(road, kind)) for road in roads
                ]
                for kind in KINDS
            }
            found.append(Entrant(family, f"{family}{_times(times)}", spent, credits))
    return found


def _k(roads: Sequence[Road]) -> str:
    """How the names of judges of the most critiques end."""
    return f", k = {roads[0].settings.k}"


def _cost(entrant: Entrant) -> str:
    return f"{entrant.flops / 1e12:.1f}"


def _times(times: int) -> str:
    return "" if times == 1 else f", {times} times the steps"


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world, where all judges start from random weights.", {})
    found = entrants(roads)
    rows = [
        [e.name, _cost(e), *(paired.over_seeds(e.credits[k]).cell() for k in KINDS)]
        for e in sorted(found, key=lambda e: e.flops)
    ]
    scalars = [e for e in found if not e.family.startswith("SFT")]
    most = [e for e in found if e.family.startswith("SFT") and e.name.endswith(_k(roads))]
    tests = {}
    for judge in most:
        low, high = (bound * judge.flops for bound in NEAR)
        for other in (e for e in scalars if low <= e.flops <= high):
            for kind in KINDS:
                name = f"{judge.name}, against {other.name} ({_cost(judge)} and {_cost(other)})"
                tests[f"{name}: {kind}"] = paired.difference(
                    judge.credits[kind], other.credits[kind]
                )
    moved = {
        e.name: paired.difference(e.credits[UNSEEN], e.credits[FRESH]) for e in (*most, *scalars)
    }
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval; `unseen`: operands and combinations that no training record "
            "has. 10^12 FLOPs of training and of judging the fresh records once.\n",
            paired.table(["judge", "FLOPs", *KINDS], rows),
            paired.tests_table(tests),
            "Unseen against fresh records, by seed, but of other records:\n",
            paired.tests_table(moved),
        ]
    )  # fmt: skip
    figures = {
        "accuracy": paired.as_json(
            {e.name: {kind: paired.over_seeds(v) for kind, v in e.credits.items()} for e in found}
        ),
        "flops": {e.name: e.flops for e in found},
        "differences": paired.as_json(tests),
        "unseen against fresh": paired.as_json(moved),
    }
    return Found(text, figures, _picture(found))


def _picture(found: Sequence[Entrant]) -> Figure:
    picture, axes = line_picture(x="FLOPs of training and judging", y="accuracy, %")
    for color, family in enumerate(dict.fromkeys(e.family for e in found)):
        members = [e for e in found if e.family == family]
        for kind in KINDS:
            axes.plot(
                [e.flops for e in members],
                [paired.over_seeds(e.credits[kind]).mean for e in members],
                marker="o", markersize=3, color=f"C{color}",
                linestyle="-" if kind == FRESH else ":",
                label=family if kind == FRESH else None,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.legend(fontsize=8, title="solid: fresh records, dotted: unseen kinds", title_fontsize=8)
    return picture


CLAIM = Claim(
    "compute",
    "Does a generative judge beat a scalar head at equal total compute?",
    runs,
    read,
)
