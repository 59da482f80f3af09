"""The judge as a reward: does a better judge make a better policy, and where is it over-optimised?

A tiny policy is trained to write responses as faulty as the world's, and then by GRPO with rewards
of the RL judge (one critique, eight, eight guided by the meta RM), of the scalar RM, of both, and
of the truth itself (`policy_train.py`). What counts is the true score of its responses.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paired
from claim import Claim, Found, line_picture
from matplotlib.figure import Figure
from roads import Road

from grm_jax.data.synthetic import make_item
from grm_jax.files import written_whole

HERE = Path(__file__).resolve().parent
# Name -> (reward, critiques).
REWARDS = {
    "one critique": ("votes", 1),
    "8 critiques": ("votes", 8),
    "8 guided by the meta RM": ("guided", 8),
    "scalar RM": ("scalar", 1),
    "8 critiques and scalar RM": ("sum", 8),
    "the truth": ("truth", 1),
}
EXAMPLES = 4000  # responses that the policy starts from
LAST = 10  # steps over which the end is averaged


def runs(road: Road) -> None:
    if not road.settings.embedded:
        return  # the truth is known in the embedded world alone
    road.pipeline()
    start = _start(road)
    for name in REWARDS:
        _train(road, start, name)


def _start(road: Road) -> Path:
    """The run of a policy that writes responses as faulty as the world's."""
    file = road.settings.runs / f"{road.seed}-policy" / "responses.jsonl"
    if not file.exists() and not road.settings.dry:
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"{road.seed} responses")
        with written_whole(file) as partial, partial.open("w", encoding="utf-8") as out:
            for _ in range(EXAMPLES):
                item = make_item(rng, 2)
                said = [
                    {"role": "user", "content": item.query},
                    {"role": "assistant", "content": rng.choice(item.response_texts)},
                ]
                out.write(json.dumps({"messages": said}) + "\n")
    return road.branch(
        "policy", "sft", "--instructions", str(file), "--sft.fitting.steps", "300",
        "--sft.fitting.batch-size", "64",
    )  # fmt: skip


def _file(road: Road, name: str) -> Path:
    reward, k = REWARDS[name]
    return road.settings.runs / f"{road.seed}-policy" / f"{reward}-{k}.jsonl"


def _train(road: Road, start: Path, name: str) -> None:
    reward, k = REWARDS[name]
    file = _file(road, name)
    if not file.exists():
        road.run(
            [
                str(HERE / "policy_train.py"), "--start", str(start / "sft"),
                "--judge", str(road.directory), "--reward", reward, "--k", str(k),
                "--seed", str(road.seed), "--output", str(file),
            ]
        )  # fmt: skip


def read(roads: Sequence[Road]) -> Found:
    if not roads[0].settings.embedded:
        return Found("Only on the embedded world, where the truth is known.", {})
    curves = {name: [_rows(_file(road, name)) for road in roads] for name in REWARDS}
    ends = {
        name: [float(np.mean([row["truth"] for row in rows[-LAST:]])) / 10 for rows in each]
        for name, each in curves.items()
    }
    rows = []
    for name, each in curves.items():
        best = [float(max(paired.smooth([row["truth"] for row in rows]))) / 10 for rows in each]
        perfect = [float(np.mean([row["perfect"] for row in rows[-LAST:]])) for rows in each]
        fall = [end - top for end, top in zip(ends[name], best, strict=True)]
        rows.append(
            [
                name, *(paired.over_seeds(v).cell() for v in (ends[name], best, perfect, fall)),
            ]
        )  # fmt: skip
    start = paired.over_seeds(
        [rows[0]["truth"] / 10 for each in curves.values() for rows in each][: len(roads)]
    )
    tests = {
        f"{a} against {b}": paired.difference(
            [np.asarray([v]) for v in ends[a]], [np.asarray([v]) for v in ends[b]]
        )
        for a, b in (
            ("8 critiques", "one critique"),
            ("8 guided by the meta RM", "8 critiques"),
            ("scalar RM", "8 critiques"),
            ("8 critiques and scalar RM", "8 critiques"),
            ("8 critiques and scalar RM", "scalar RM"),
        )
    }
    text = "\n".join(
        [
            f"The true score of the policy's responses, in percent of 10: mean of {len(roads)} "
            f"seeds with a 95% t interval. It starts at {start.mean:.1f}. The end is the mean of "
            f"the last {LAST} steps; the fall is from the best {LAST} steps in a row to the end, "
            "and so never above 0: compare it between rewards.\n",
            paired.table(
                ["reward", "end", "best", "responses without a fault", "fall"], rows
            ),
            paired.tests_table(tests),
        ]
    )  # fmt: skip
    figures = {
        "end": paired.as_json({name: paired.over_seeds(v) for name, v in ends.items()}),
        "differences": paired.as_json(tests),
    }
    return Found(text, figures, _picture(curves))


def _rows(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _picture(curves: dict[str, list[list[dict[str, float]]]]) -> Figure:
    picture, axes = line_picture(x="step of GRPO", y="true score of the policy's responses")
    for name, each in curves.items():
        true = np.mean([[row["truth"] for row in rows] for rows in each], axis=0)
        axes.plot(paired.smooth(true), label=name)
    axes.legend(fontsize=8)
    return picture


CLAIM = Claim(
    "policy",
    "Does a better judge make a better policy?",
    runs,
    read,
)
