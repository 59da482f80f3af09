r"""Does a small model learn to judge from scores alone, side by side or each response by itself?

    python experiments/real_text/direct.py --base models/smollm2 \
        --train runs/real_text/data/train.jsonl --heldout runs/real_text/data/heldout.jsonl \
        --output runs/direct

    records of one source, with two responses
        together: "\boxed{8, 3}" behind both responses, once in each order
        alone:    "\boxed{1}" or "\boxed{0}" behind one response, once for each
    -> SFT on these, an equal number of rows and steps -> OUTPUT/WAY, resumable
    -> expected scores of held-out records, both orders or both responses, one sample each
    -> accuracy of each way, and how far one is above the other: direct.md

There is no critique. What is left out may be what a judge needs, so that this says what the
weights, the records and the steps allow where nothing is said in words, and no critique that says
little stands between the responses and their scores.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import report
import tyro

from grm_jax.critique import best_label
from grm_jax.data.preferences import Preference, read_preferences
from grm_jax.data.rows import iterate_rows, write_rows
from grm_jax.errors import UserError
from grm_jax.scoring.statistics import mean_interval, paired_difference

Way = Literal["together", "alone"]
UNREADABLE = 3  # the status of `grm_jax.judge` where a row has no readable critique
BUCKETS = ("192", "256", "320", "384", "448", "512")


@dataclasses.dataclass(frozen=True)
class Arguments:
    base: Path
    """A Hugging Face folder."""
    train: Path
    """Records to learn from."""
    heldout: Path
    """Records to judge."""
    output: Path
    """Where the runs, the verdicts and direct.md go."""
    size: str = "smollm2_135m"
    """The recipe's size."""
    domain: str = "harmless"
    """The source of the records."""
    records: int = 800
    """How many are learnt from."""
    max_characters: int = 1000
    """Records whose conversation and responses are longer are left out."""
    steps: int = 100
    """Of 16 rows. Two rows of each record: 100 steps are one pass over 800 records."""
    learning_rate: float = 1e-4
    ways: tuple[Way, ...] = ("together", "alone")


def main(args: Arguments) -> None:
    train, heldout = (pairs(path, args) for path in (args.train, args.heldout))
    if len(train) < args.records:
        raise UserError(f"--records {args.records}: {args.train} has {len(train)} such records")
    right = {}
    for way in args.ways:
        folder = args.output / way
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "train.jsonl", learnt(way, train[: args.records]))
        fit(args, way, folder)
        right[way] = credits(way, heldout, judge(args, way, heldout, folder))
    text = table(right)
    (args.output / "direct.md").write_text(text, encoding="utf-8")
    print(text)


def pairs(path: Path, args: Arguments) -> list[Preference]:
    """The records with two responses that are short enough, of the domain."""
    records = report.shorter(read_preferences(path), args.max_characters)
    return [r for r in records if r.domain == args.domain and len(r.responses) == 2]


def learnt(way: Way, records: Sequence[Preference]) -> list[dict[str, Any]]:
    """The rows to learn from, two of each record; SFT shuffles them."""
    rows = []
    for record in records:
        best = best_label(record.labels)
        asked = {"query": list(record.turns), "finish_reason": "stop"}
        for i in (0, 1):
            if way == "alone":
                rows.append(asked | {
                    "example_id": f"{record.id}#{i}", "responses": [record.responses[i]],
                    "labels": [float(i == best)], "text": f"\\boxed{{{int(i == best)}}}",
                })  # fmt: skip
            else:
                order = [i, 1 - i]
                scores = ", ".join("8" if j == best else "3" for j in order)
                rows.append(asked | {
                    "example_id": record.id, "sample": i, "responses": list(record.responses),
                    "labels": list(record.labels), "order": order, "text": f"\\boxed{{{scores}}}",
                })  # fmt: skip
    return rows


def fit(args: Arguments, way: Way, folder: Path) -> None:
    """SFT from the base model; a stage that was finished is not run again."""
    command = [
        sys.executable, "-m", "grm_jax.train", "--config", f"sft.py:{args.size}",
        "--base", str(args.base), "--preferences", str(args.train),
        "--instructions", str(folder / "train.jsonl"), "--run-dir", str(folder),
        "--long-prompts", "skip", "--length-buckets", *BUCKETS,
        "--sft.fitting.steps", str(args.steps),
        "--sft.fitting.optimizer.learning-rate", str(args.learning_rate),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def judge(args: Arguments, way: Way, records: Sequence[Preference], folder: Path) -> Path:
    """The verdicts on records, or on each of their responses."""
    rows: list[dict[str, Any]] = [
        {"id": f"{record.id}#{i}", "turns": list(record.turns), "responses": list(shown)}
        for record in records
        for i, shown in enumerate(
            [record.responses] if way == "together" else [[text] for text in record.responses]
        )
    ]
    write_rows(folder / "heldout.jsonl", rows)
    command = [
        sys.executable, "-m", "grm_jax.judge", "--model", str(folder / "sft" / "model"),
        "--input", str(folder / "heldout.jsonl"), "--output", str(folder / "judged.jsonl"),
        "-k", "2" if way == "together" else "1", "--expected", "--max-new-tokens", "12",
    ]  # fmt: skip
    if (status := subprocess.run(command, check=False).returncode) not in (0, UNREADABLE):
        raise UserError(f"this command ended with status {status}: {' '.join(command)}")
    return folder / "judged.jsonl"


def credits(way: Way, records: Sequence[Preference], file: Path) -> np.ndarray:
    """Of each record: 1 where the best response has the higher score, 0.5 for a tie, 0 where not
    all scores can be read."""
    scores: dict[str, list[float]] = {}
    for row in (line.load() for line in iterate_rows(file)):
        scores[row["id"]] = [float(score) for score in row["verdict"]["scores"]]
    found = []
    for record in records:
        ids = [f"{record.id}#0"] if way == "together" else [f"{record.id}#{i}" for i in (0, 1)]
        said = [score for name in ids for score in scores[name]]
        best = best_label(record.labels)
        readable = len(said) == 2
        found.append(0.5 * (1 + np.sign(said[best] - said[1 - best])) if readable else 0.0)
    return np.asarray(found)


def table(right: Mapping[Way, np.ndarray]) -> str:
    """The accuracies with their intervals, and the difference where there are two."""
    lines = ["| read | records | accuracy in percent, 95% interval |", "|---|---:|---:|"]
    for way, values in right.items():
        found = mean_interval(values)
        low, high = found.bounds or (0.0, 1.0)
        lines.append(
            f"| {way} | {len(values)} | {100 * found.value:.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}] |"
        )
    if len(right) == 2:
        over = paired_difference(right["alone"], right["together"])
        low, high = over.bounds or (-1.0, 1.0)
        lines.append(
            f"| alone less together | | {100 * over.value:+.1f} "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except (UserError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
