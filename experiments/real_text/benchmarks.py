"""What a run on real text reaches on public benchmarks.

    python experiments/real_text/benchmarks.py --run runs/smollm2_135m --data DATA \
        --output experiments/real_text/smollm2_135m

    for each model that the run has (sft, rft, rl; with the meta and the scalar RM, if any)
        python -m grm_jax.evaluate --bench rewardbench,llmbar,judgebench,rmbench -> results.json,
        resumable: RUN/benchmarks/STAGE/BENCHMARK
    -> a row for each way to judge, a column for each benchmark's own metric: benchmarks.md

DATA holds the benchmarks' directories. Prompts of more than --max-prompt-tokens lose their middle.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro
from report import STAGES, rm_options, trained

from grm_jax.errors import UserError
from grm_jax.scoring import report
from grm_jax.scoring.results import Results, read_results


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Path
    """The run directory."""
    data: Path
    """The directory that holds the benchmarks' directories."""
    output: Path
    """Where benchmarks.md goes; samples are kept in the run directory."""
    benches: tuple[str, ...] = ("rewardbench", "llmbar", "judgebench", "rmbench")
    """The benchmarks."""
    stages: tuple[str, ...] = STAGES
    """Whose models judge, of those that the run has."""
    k: int = 4
    """Critiques of each record, besides the greedy one."""
    limit: int | None = None
    """Judge only this many items of each benchmark: a random sample of all of its sections."""
    max_prompt_tokens: int = 1024
    """The longest prompt."""


def main(args: Arguments) -> None:
    found: dict[str, dict[str, Results]] = {}
    for stage in trained(args.run, args.stages):
        folder = evaluate(args, stage)
        found[stage] = {b: read_results(folder / b / "results.json") for b in args.benches}
    text = table(found, args.benches)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmarks.md").write_text(text, encoding="utf-8")
    print(text)


def evaluate(args: Arguments, stage: str) -> Path:
    """The results of a stage's model; what was sampled before is not sampled again."""
    folder = args.run / "benchmarks" / stage
    command = [
        sys.executable, "-m", "grm_jax.evaluate", "--bench", ",".join(args.benches),
        "--data", str(args.data), "--model", str(args.run / stage / "model"), "-k", str(args.k),
        "--output", str(folder), "--cache", str(args.run / "report" / "cache"),
        "--long-prompts", "truncate-middle", "--max-prompt-tokens", str(args.max_prompt_tokens),
        "--probes", "0",
    ]  # fmt: skip
    command += [] if args.limit is None else ["--limit", str(args.limit)]
    subprocess.run([*command, *rm_options(args.run)], check=True)
    return folder


def table(found: Mapping[str, Mapping[str, Results]], benches: Sequence[str]) -> str:
    """Each benchmark's headline of each method, with what a reader must know of it."""
    first = next(iter(found.values()))
    heads = [f"{bench} ({first[bench].records:,} records)" for bench in benches]
    lines = [f"| judge | {' | '.join(heads)} |", "|---|" + "---:|" * len(benches)]
    scalar = ""
    for stage, results in found.items():
        names = [method.name for method in results[benches[0]].methods]
        for name in names:
            figures = [results[bench].figure(name) for bench in benches]
            cells = [report.cell(figure) if figure else "-" for figure in figures]
            row = f"| {name if name == 'scalar' else f'{stage}, {name}'} | {' | '.join(cells)} |"
            if name == "scalar":
                scalar = row
            else:
                lines.append(row)
    lines += [scalar] if scalar else []
    notes = [f"- {bench}: {note}" for bench in benches for note in first[bench].notes]
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
