"""Votes and the scalar head together: the mean vote plus a weight times the scalar score.

The weight is chosen on one half of the held-out records (by a digest of their ids) and used on the
other, in both directions. Records with unseen operands and combinations have the weight that is
best on all held-out records of the training distribution. A judge may also be asked only where the
scalar scores are close (routing).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import evidence
import flops
import numpy as np
import paired
from claim import Claim, Found, line_picture
from evidence import Judged
from matplotlib.figure import Figure
from roads import Road
from voting import STAGES, read_stage

from grm_jax.data.critiques import read_critiques
from grm_jax.data.examples import reply_example
from grm_jax.tokenizer import load_tokenizer

WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
LONGER = (2, 4)  # times the recipe's steps of the scalar RM


def runs(road: Road) -> None:
    road.pipeline()
    for times in LONGER:
        road.scalar_rm(times)


def read(roads: Sequence[Road]) -> Found:
    most = roads[0].settings.k
    ks = tuple(dict.fromkeys((min(8, most), most)))
    rows, tests = [], {}
    by_weight: dict[str, dict[float, paired.Estimate]] = {}
    sums: dict[tuple[str, int], list[np.ndarray]] = {}
    for stage, label in STAGES.items():
        found = [read_stage(road, stage) for road in roads]
        scalar = [evidence.scalar_accuracy(judged) for judged in found]
        for k in ks:
            sweeps = [sweep(judged, k) for judged in found]
            plain = [by[0.0] for by in sweeps]
            chosen = [crossed(judged, by) for judged, by in zip(found, sweeps, strict=True)]
            sums[stage, k] = chosen
            fixed = [by[0.5] for by in sweeps]
            weighted = [evidence.accuracy(judged, k, evidence.scalar_weighted) for judged in found]
            name = f"{label}, {k}"
            columns = (plain, scalar, fixed, chosen, weighted)
            rows.append([name, *(paired.over_seeds(each).cell() for each in columns)])
            tests[f"{name}: sum against votes"] = paired.difference(chosen, plain)
            tests[f"{name}: sum against the scalar RM"] = paired.difference(chosen, scalar)
            by_weight[name] = {w: paired.over_seeds([by[w] for by in sweeps]) for w in WEIGHTS}
    shifted = []
    if roads[0].records(shifted=True):
        shifted = [read_stage(road, "rl", shifted=True) for road in roads]
    best = {road.seed: best_weight(sweep(read_stage(road, "rl"), most)) for road in roads}
    moved = {
        "votes": [evidence.accuracy(judged, most, evidence.plain) for judged in shifted],
        "scalar RM": [evidence.scalar_accuracy(judged) for judged in shifted],
        "sum": [
            evidence.accuracy(judged, most, evidence.hybrid(best[road.seed]))
            for road, judged in zip(roads, shifted, strict=True)
        ],
    }
    if shifted:
        name = "RL on unseen operands and combinations: sum against"
        tests[f"{name} the scalar RM"] = paired.difference(moved["sum"], moved["scalar RM"])
        tests[f"{name} votes"] = paired.difference(moved["sum"], moved["votes"])
    alone = {times: scalar_alone(roads, times) for times in (1, *LONGER)}
    longer = []
    for times in LONGER:
        name = _scalar_name(times)
        cells = [name, paired.over_seeds(alone[times]).cell()]
        for stage, label in STAGES.items():
            found = [with_scalar(road, stage, times) for road in roads]
            both = [crossed(judged, sweep(judged, most)) for judged in found]
            cells.append(paired.over_seeds(both).cell())
            test = f"{name}: sum with {label}, {most}, against it alone"
            tests[test] = paired.difference(both, alone[times])
        longer.append(cells)
        test = f"{name}, alone, against the recipe's and {STAGES['sft']}'s {most} votes"
        tests[test] = paired.difference(alone[times], sums["sft", most])
    routed = []
    for share in SHARES:
        cells = [f"{100 * share:.0f}%"]
        for stage in STAGES:
            values = [_routed(read_stage(road, stage), most, share) for road in roads]
            cells.append(paired.over_seeds(values).cell())
        routed.append(cells)
    text = "\n".join(
        [
            f"Held-out records with two responses or more, mean of {len(roads)} seeds in percent "
            "with a 95% t interval. `sum`: the weight of the scalar score is chosen on the other "
            "half of the records.\n",
            paired.table(
                ["model, critiques", "votes", "scalar RM", "sum, weight 0.5", "sum",
                 "votes weighted by the scalar RM"],
                rows,
            ),
            paired.tests_table(tests),
            *(_unseen(moved, most) if shifted else ()),
            f"The judge is asked (sum, weight 0.5, {most} critiques) only where the two highest "
            "scalar scores of a record are closest:\n",
            paired.table(["share of records judged", *STAGES.values()], routed),
            f"The sum with a scalar RM that was trained for longer, {most} critiques:\n",
            paired.table(
                ["", "alone", *(f"sum with {label}" for label in STAGES.values())],
                longer,
            ),
            "Compute of training and of judging these records once, in 10^12 FLOPs. Sampling for "
            "RFT and RL is not counted, which favours their rows:\n",
            paired.table(["", "FLOPs", "accuracy"], _costs(roads, alone, by_weight)),
        ]
    )  # fmt: skip
    figures = {
        "weights": paired.as_json(by_weight),
        "differences": paired.as_json(tests),
        "shifted": paired.as_json({n: paired.over_seeds(v) for n, v in moved.items() if v}),
    }
    return Found(text, figures, _picture(by_weight))


def with_scalar(road: Road, stage: str, times: int) -> Judged:
    """A stage's critiques, and the scores of a scalar RM.

    Args:
      times: the scalar RM's training steps, as a multiple of the recipe's.
    """
    judged = read_stage(road, stage)
    if times == 1:
        return judged
    scores = evidence.scalar_scores(road.scalar_rm(times), road.records())
    return [
        dataclasses.replace(g, scalar=np.asarray([scores[r.id] for r in g.records], float))
        for g in judged
    ]


def scalar_alone(roads: Sequence[Road], times: int) -> list[np.ndarray]:
    """Credits [R] of each seed by the scalar RM alone. `times`: as in `with_scalar`."""
    return [evidence.scalar_accuracy(with_scalar(road, "sft", times)) for road in roads]


def _scalar_name(times: int) -> str:
    return "scalar RM" if times == 1 else f"scalar RM, {times} times the steps"


def _unseen(moved: dict[str, list[np.ndarray]], most: int) -> list[str]:
    cells = [paired.over_seeds(values).cell() for values in moved.values()]
    head = f"Unseen operands and combinations, RL's model, {most} critiques:\n"
    return [head, paired.table(list(moved), [cells])]


def _costs(
    roads: Sequence[Road],
    alone: Mapping[int, Sequence[np.ndarray]],
    by_weight: Mapping[str, Mapping[float, paired.Estimate]],
) -> list[list[str]]:
    """(what, FLOPs, accuracy) of scalar RMs, votes, and sums of both with weight 0.5."""
    rows = []
    base = roads[0].directory
    trained = {stage: flops.training(base / stage) for stage in (*STAGES, "scalar_rm")}
    read = read_stage(roads[0], "sft")
    prompt, critique = lengths(roads[0])
    scored = flops.reading(base / "scalar_rm", scalar_tokens(roads[0]))
    for times, credits in alone.items():
        cost = trained["sft"] + times * trained["scalar_rm"] + scored
        cell = paired.over_seeds(credits).cell()
        rows.append([_scalar_name(times), f"{cost / 1e12:.1f}", cell])
    cost = 0.0
    for stage, label in STAGES.items():
        cost += trained[stage]
        for k in sorted({min(8, roads[0].settings.k), roads[0].settings.k}):
            judged = flops.judging(base / stage, read, prompt, critique, k)
            for name, extra, weight in (
                (f"{label}, {k} votes", 0.0, 0.0),
                (f"{label}, {k} votes and scalar RM", trained["scalar_rm"] + scored, 0.5),
            ):
                cell = by_weight[f"{label}, {k}"][weight].cell()
                rows.append([name, f"{(cost + judged + extra) / 1e12:.1f}", cell])
    return rows


def lengths(road: Road) -> tuple[float, float]:
    """The mean numbers of tokens of a prompt and of a critique (the RL model's)."""
    rows = read_critiques(road.samples("rl"))
    tokenizer = load_tokenizer(str(road.directory / "rl" / "model"))
    records = road.records()
    texts = [" ".join((*(turn["content"] for turn in r.turns), *r.responses)) for r in records]
    prompt = np.mean([len(tokenizer.encode(text)) for text in texts])
    return float(prompt), float(np.mean([row.tokens for row in rows]))


def scalar_tokens(road: Road) -> int:
    """What the scalar RM reads of all records: each response after its conversation."""
    tokenizer = load_tokenizer(str(road.directory / "scalar_rm" / "model"))
    return sum(
        reply_example(record.turns, response, tokenizer).length
        for record in road.records()
        for response in record.responses
    )


def sweep(judged: Judged, k: int) -> dict[float, np.ndarray]:
    """Credits [R] of each weight."""
    return {w: evidence.accuracy(judged, k, evidence.hybrid(w)) for w in WEIGHTS}


def best_weight(credits: dict[float, np.ndarray], chosen: np.ndarray | None = None) -> float:
    """The weight with the largest mean credit on the chosen records; of equal ones the smaller."""
    chosen = np.ones(len(credits[0.0]), bool) if chosen is None else chosen
    return max(WEIGHTS, key=lambda w: (round(float(credits[w][chosen].mean()), 9), -w))


def crossed(judged: Judged, credits: dict[float, np.ndarray]) -> np.ndarray:
    """Credits [R] with the weight that is best on the half that a record is not in."""
    half = np.asarray([_half(record.id) for group in judged for record in group.records])
    return np.where(half, credits[best_weight(credits, ~half)], credits[best_weight(credits, half)])


def _half(id: str) -> bool:
    return hashlib.sha256(id.encode()).digest()[0] < 128


def _routed(judged: Judged, k: int, share: float) -> np.ndarray:
    """Credits [R] where only the share of records with the smallest scalar margin is judged."""
    scalar = evidence.scalar_accuracy(judged)
    summed = evidence.accuracy(judged, k, evidence.hybrid(0.5))
    margins = evidence.by_record(
        judged, lambda group: np.diff(np.sort(group.scalar, axis=1)[:, -2:], axis=1)[:, 0]
    )
    asked = np.argsort(np.argsort(margins, kind="stable")) < round(share * len(margins))
    return np.where(asked, summed, scalar)


def _picture(by_weight: Mapping[str, Mapping[float, paired.Estimate]]) -> Figure:
    picture, axes = line_picture(x="weight of the scalar score (0: votes alone)", y="accuracy, %")
    for name, figures in by_weight.items():
        values = [figures[w].mean for w in WEIGHTS]
        axes.plot(range(len(WEIGHTS)), values, marker="o", markersize=3, label=name)
    axes.set_xticks(range(len(WEIGHTS)), [f"{w:g}" for w in WEIGHTS])
    axes.legend(fontsize=8, title="model, critiques", title_fontsize=8)
    return picture


CLAIM = Claim(
    "hybrid",
    "Are votes and a scalar reward model together better than either?",
    runs,
    read,
    quick=True,
)
