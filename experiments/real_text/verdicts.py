"""Scores that were drawn beside expected ones, of the same critiques of held-out records.

    python experiments/real_text/verdicts.py --run runs/smollm2_135m \
        --heldout runs/real_text/data/heldout.jsonl --output experiments/real_text/smollm2_135m

    for each model that the run has (sft, rft, rl)
        python -m grm_jax.judge --expected -> RUN/report/STAGE-expected-K.jsonl, resumable
    -> accuracy of one critique and of votes, by the scores that were drawn and by the means of
       their distributions, against chance: verdicts.md

A drawn score is one sample of its distribution. Where a small judge is nearly undecided, it is
mostly noise, and the mean might say more. A tie earns one over the number of tied responses, and a
record without a readable critique is wrong.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "claims"))
import evidence
import report

from grm_jax.data.preferences import read_preferences
from grm_jax.errors import UserError
from grm_jax.scoring.statistics import paired_difference

UNREADABLE = 3  # the status of `grm_jax.judge` where a row has no readable critique


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path
    """The run directory."""
    heldout: Path
    """Records that no stage has learnt from."""
    output: Path
    """Where verdicts.md goes; verdicts are kept in the run directory."""
    stages: tuple[str, ...] = report.STAGES
    """Whose models judge, of those that the run has."""
    k: int = 4
    """Critiques of each record."""
    max_characters: int = 4096
    """Records whose conversation and responses are longer are left out."""


def main(args: Arguments) -> None:
    folder = args.run / "report"
    records, rows = report.short(list(read_preferences(args.heldout)), args.max_characters, folder)
    found = {}
    for stage in report.trained(args.run, args.stages):
        drawn, expected = evidence.read_verdicts(records, judge(args, stage, rows, folder))
        found[stage] = {"drawn": drawn, "expected": expected}
    text = table(found, args.k)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "verdicts.md").write_text(text, encoding="utf-8")
    print(text)


def judge(args: Arguments, stage: str, rows: Path, folder: Path) -> Path:
    """The verdicts of a stage's model; what was judged before is not judged again."""
    file = folder / f"{stage}-expected-{args.k}.jsonl"
    command = [
        sys.executable, "-m", "grm_jax.judge", "--model", str(args.run / stage / "model"),
        "--input", str(rows), "--output", str(file), "-k", str(args.k), "--expected",
    ]  # fmt: skip
    if (status := subprocess.run(command, check=False).returncode) not in (0, UNREADABLE):
        raise UserError(f"this command ended with status {status}: {' '.join(command)}")
    return file


def table(found: Mapping[str, Mapping[str, evidence.Judged]], k: int) -> str:
    """A row for each stage, kind of scores and number of votes, with the difference to chance."""
    lines = [
        "| judge | records | accuracy in percent, 95% interval | chance | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage, kinds in found.items():
        for kind, judged in kinds.items():
            guess = evidence.guesses(judged)
            for votes in dict.fromkeys((1, 2, k)):
                if votes > k:
                    continue
                values = evidence.accuracy(judged, votes, evidence.plain)
                over, chance = paired_difference(values, guess), 100 * float(guess.mean())
                bounds, p = "", "-"
                if over.bounds is not None and over.p_value is not None:
                    low, high = (chance + 100 * bound for bound in over.bounds)
                    bounds, p = f" [{low:.1f}, {high:.1f}]", f"{over.p_value:.3f}"
                what = "one critique" if votes == 1 else f"votes of {votes}"
                lines.append(
                    f"| {stage}, {what}, {kind} scores | {len(values)} | "
                    f"{100 * values.mean():.1f}{bounds} | {chance:.1f} | {p} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
