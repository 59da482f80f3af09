"""One response, and eight: the first are rare in training, the second are never in it.

A single response is called acceptable or not; what the pipeline's evaluation says of them is shown.
Eight responses are more than a critique of this world can read. They are judged in groups
(`--at-once` of `python -m grm_jax.judge`): for every critique they are dealt anew into groups of
four, or of two, and a response's scores in all critiques are added up (Eq. 14). Their records are
made as others are, but where the best of eight must be unique it is mostly without a fault, and
its rivals are close.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import evidence
import numpy as np
import paired
import voting
from claim import Claim, Found
from evidence import Judged
from roads import Road

from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic import make_item
from grm_jax.data.synthetic_files import preferences

STAGE = "rl"
NAME = "eight"
MANY = 8
SIZES = (4, 2)  # responses that a critique reads
RECORDS = 300
SINGLE = "n=1"  # as the evaluation calls it
USUAL = "2 to 4 responses"


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # records of eight responses are made by the embedded world
    road.pipeline()
    rows = [
        {"id": r.id, "turns": list(r.turns), "responses": list(r.responses)}
        for r in records(road.seed)
    ]
    for size in SIZES:
        road.judge_rows(STAGE, NAME, lambda: rows, road.settings.k, at_once=size)


def records(seed: int) -> list[Preference]:
    """Records of eight responses, made as those of training are."""
    rng = random.Random(f"{seed} eight")
    return preferences(NAME, [make_item(rng, MANY) for _ in range(RECORDS)])


def _eight(road: Road, size: int) -> Judged:
    file = road.rows_file(STAGE, NAME, road.settings.k, size)
    drawn, _ = evidence.read_verdicts(records(road.seed), file)
    return drawn


def _tokens(road: Road, size: int) -> float:
    """The mean number of tokens of a verdict, read and written."""
    file = road.rows_file(STAGE, NAME, road.settings.k, size)
    usages = [json.loads(line)["verdict"]["usage"] for line in file.open(encoding="utf-8")]
    return float(np.mean([u["prompt_tokens"] + u["sampled_tokens"] for u in usages]))


def _single(road: Road) -> dict[str, float]:
    """Accuracy of single responses, by the name of the method."""
    file = road.directory / "evaluation" / "results.json"
    methods = json.loads(file.read_text(encoding="utf-8"))["methods"]
    return {m["name"]: m["figures"]["responses"][SINGLE]["value"] for m in methods}


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world, which makes records of eight responses.", {})
    most = roads[0].settings.k
    ks = tuple(dict.fromkeys((1, min(8, most), most)))
    eight = {
        f"8 responses in groups of {size}": [_eight(road, size) for road in roads] for size in SIZES
    }
    usual = [voting.read_stage(road, STAGE) for road in roads]
    alone = [evidence.scalar_credits(road.directory, records(road.seed)) for road in roads]
    scalar = dict.fromkeys(eight, alone) | {USUAL: [evidence.scalar_accuracy(s) for s in usual]}
    credits = {name: evidence.credits(found, ks) for name, found in {USUAL: usual, **eight}.items()}
    tokens = {size: float(np.mean([_tokens(road, size) for road in roads])) for size in SIZES}
    names = ("sample@1", *(f"vote@{k}" for k in ks[1:]), "scalar")
    single = {name: paired.over_seeds([_single(road)[name] for road in roads]) for name in names}
    rows = [["1 response, acceptable or not", *(single[name].cell() for name in names)]]
    for name, by_k in credits.items():
        cells = [paired.over_seeds(by_k[k]).cell() for k in ks]
        rows.append([name, *cells, paired.over_seeds(scalar[name]).cell()])
    fours, twos = (credits[name] for name in eight)
    tests = {f"groups of 4 against 2, {k}": paired.difference(fours[k], twos[k]) for k in ks}
    for name in eight:
        test = f"{name}, {most}, against the scalar RM"
        tests[test] = paired.difference(credits[name][most], scalar[name])
    text = "\n".join(
        [
            f"Accuracy in percent, mean of {len(roads)} seeds with a 95% t interval; the RL model, "
            f"each response read by k of its critiques. With {MANY} responses chance is "
            f"{100 / MANY:g}.\n",
            paired.table(["records", *(f"k = {k}" for k in ks), "scalar RM"], rows),
            paired.tests_table(tests),
            f"Tokens of a verdict of {most} critiques, read and written: "
            + ", ".join(f"{count:,.0f} in groups of {size}" for size, count in tokens.items())
            + ".",
        ]
    )
    figures = {
        "tokens of a verdict": {str(size): count for size, count in tokens.items()},
        "single": paired.as_json(single),
        "accuracy": paired.as_json(paired.estimates(credits)),
        "scalar": paired.as_json({name: paired.over_seeds(v) for name, v in scalar.items()}),
        "differences": paired.as_json(tests),
    }
    return Found(text, figures)


CLAIM = Claim(
    "responses",
    "Does the judge hold on a single response, and on eight, which no critique in training read?",
    runs,
    read,
)
