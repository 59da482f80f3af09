"""The paper's ablations (Table 4): what each part of the training, and k_meta, is worth.

RFT is run again without critiques that have a hint, and without those that have none; RL is run
again from the SFT model, as the paper's "w/o rejective sampling" is. The SFT model itself is RFT
without either, and the RFT model is the judge without RL. Without principles the SFT stage learns
from the same critiques less their line of criteria, and RFT and RL follow from its model; that is
for the embedded world alone, where it is known which line that is. k_meta is read from the
critiques that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road

# Row of the table -> the stage of the pipeline whose model it is.
WHOLE = {
    "RFT and RL": "rl",
    "RFT, no RL": "rft",
    "SFT alone": "sft",
}
# Row of the table -> (name of the branch, its stage, options). Of a single critique without a hint
# RFT keeps none: right, it is all right, so that the record is too easy.
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "RFT without hinted critiques, no RL": ("rft-not-hinted", "rft", ("--rft.no-hinted",)),
    "RFT of hinted critiques alone, no RL": ("rft-hinted", "rft", ("--rft.samples", "1")),
    "RL without RFT": ("rl-from-sft", "rl", ()),
}
NO_PRINCIPLES = "RFT and RL, without principles"
# Row -> what it is compared with.
AGAINST = {
    NO_PRINCIPLES: "RFT and RL",
    "RFT, no RL": "RFT and RL",
    "RL without RFT": "RFT and RL",
    "RFT without hinted critiques, no RL": "RFT, no RL",
    "RFT of hinted critiques alone, no RL": "RFT, no RL",
    "SFT alone": "RFT, no RL",
}


def runs(road: Road) -> None:
    road.pipeline()
    for name in _parts(road):
        road.judged(_stage(road, name))


def _parts(road: Road) -> list[str]:
    """The rows whose models the pipeline does not have."""
    return [*PARTS, *([NO_PRINCIPLES] * (road.settings.embedded))]


def _stage(road: Road, name: str) -> Path:
    """The directory of the stage that made a row's model."""
    if name in WHOLE:
        return road.directory / WHOLE[name]
    if name == NO_PRINCIPLES:
        return _without_principles(road)
    folder, stage, options = PARTS[name]
    if stage == "rl":
        options = (*options, "--init", str(road.directory / "sft" / "model"))
    return road.branch(folder, stage, *options) / stage


def _without_principles(road: Road) -> Path:
    """SFT, RFT and RL again, from critiques without criteria."""
    name = "no-principles"
    road.branch(name, "sft", "--instructions", str(road.instructions(name, without_criteria)))
    road.branch(name, "rft")
    return road.branch(name, "rl") / "rl"


def without_criteria(text: str) -> str:
    """A critique of the embedded world less its first line, which names the criteria."""
    criteria, _, rest = text.partition("\n")
    if "Criteria:" not in criteria:
        raise ValueError(f"no line of criteria at the beginning of {text!r}")
    return rest


def _judged(road: Road, name: str) -> Judged:
    if name in WHOLE:
        return voting.read_stage(road, WHOLE[name])
    file = road.judged(_stage(road, name))
    return evidence.read_samples(road.records(), file, None, road.settings.k)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = tuple(dict.fromkeys((1, min(8, most), most)))
    found = {name: [_judged(road, name) for road in roads] for name in (*WHOLE, *_parts(roads[0]))}
    credits = {name: evidence.credits(seeds, ks) for name, seeds in found.items()}
    figures = paired.estimates(credits)
    rows = [[name, *(figures[name][k].cell() for k in ks)] for name in credits]
    tests = {
        f"{name} against {other}, {_votes(k)}": paired.difference(
            credits[name][k], credits[other][k]
        )
        for name, other in AGAINST.items()
        if name in credits
        for k in ks
    }
    guided = _guided(roads, most)
    plain = credits["RFT and RL"][most]
    kept_rows = [
        [str(kept), paired.over_seeds(values).cell(), paired.difference(values, plain).signed()]
        for kept, values in guided.items()
    ]
    text = "\n".join(
        [
            "Accuracy on held-out records with two responses or more, in percent: the mean of "
            f"{len(roads)} seeds with a 95% t interval.\n",
            paired.table(["training", *(f"k = {k}" for k in ks)], rows),
            paired.tests_table(tests),
            f"The k_meta of {most} critiques of the whole judge that the meta RM ranks highest, "
            f"and the difference to plain votes of {most}:\n",
            paired.table(["k_meta", "accuracy", "against plain votes, points"], kept_rows),
        ]
    )
    numbers = {
        "accuracy": paired.as_json(figures),
        "differences": paired.as_json(tests),
        "k_meta": paired.as_json({k: paired.over_seeds(values) for k, values in guided.items()}),
    }
    return Found(text, numbers)


def _votes(k: int) -> str:
    return "one critique" if k == 1 else f"votes of {k}"


def _guided(roads: Sequence[Road], most: int) -> dict[int, list[np.ndarray]]:
    """k_meta -> by seed the credits of guided votes of `most` critiques."""
    kept = [k for k in (1, 8, 16) if k < most]
    whole = [voting.read_stage(road, "rl") for road in roads]
    return {
        k: [evidence.accuracy(judged, most, evidence.keeping(k)) for judged in whole] for k in kept
    }


CLAIM = Claim(
    "ablations",
    "What is each part of the training worth, and how many critiques should the meta RM keep?",
    runs,
    read,
)
