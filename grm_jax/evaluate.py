"""Evaluate a judge on a benchmark: figures with 95% intervals, how voting scales with k, rates.

    python -m grm_jax.evaluate --bench rewardbench --data DIR --model RUN --meta RUN -k 32
    python -m grm_jax.evaluate --bench preferences --data my.jsonl --judge longer
    python -m grm_jax.evaluate --bench rewardbench --data DIR --samples OLD/samples.jsonl

Prints a table and writes results.json, table.md, samples.jsonl and the plot accuracy.{png,svg}.
Exit status: 0, 1 for what can be mended (one line says how), 2 for wrong arguments.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import tyro

from grm_jax.benchmarks import get_benchmark
from grm_jax.benchmarks.aggregate import SampleRow, TieRule, read_samples
from grm_jax.benchmarks.base import BenchmarkRecords
from grm_jax.benchmarks.judges import JudgeName, judge_rows
from grm_jax.benchmarks.report import print_results, write_report
from grm_jax.benchmarks.results import Results, assess
from grm_jax.benchmarks.statistics import RESAMPLES
from grm_jax.data.preferences import Preference

if TYPE_CHECKING:
    from grm_jax.judging import JudgeOptions, ProgressUpdate


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exactly one of --model, --judge and --samples says who judges."""

    bench: str
    """Benchmark: rewardbench, synthetic, or preferences (any preference file)."""
    data: Path | None = None
    """Its file or directory. What to download is said where it is missing. Default for the
    embedded world: the run that the model is of."""
    model: Path | None = None
    """Generative reward model: a run directory, a model directory or a Hugging Face one."""
    meta: Path | None = None
    """Meta RM that guides the votes; only with --model."""
    judge: JudgeName | None = None
    """A judge without a model: `longer` (more characters win) or `random`."""
    samples: Path | None = None
    """samples.jsonl of an earlier evaluation, to compute its figures again."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 32
    """Samples a record, besides the greedy one; 0: only that one."""
    temperature: float | None = None
    """Of the k samples; default: the judge's own, else 0.5, at which the paper votes."""
    max_new_tokens: int | None = None
    """Length limit of a critique, in tokens; default: the judge's own, else 1024."""
    adaptive: float | None = None
    """Stop sampling a record once the probability that further samples up to k change its verdict
    is at most this, e.g. 0.01; 0: only when they can not."""
    k_meta: int | None = None
    """Samples that a guided vote keeps; default: half of its k, as in the paper."""
    ties: TieRule = "expected"
    """A tie for the best response: its expectation under a shuffle, or wrong (strict accuracy)."""
    threshold: float = 0.5
    """Single responses: a mean score above it says correct."""
    limit: int | None = None
    """Judge only so many records: a random sample in which every section is present."""
    output: Path | None = None
    """Directory of the results; default: runs/evaluate/BENCH/JUDGE, or beside --samples."""
    resamples: int = RESAMPLES
    """Bootstrap resamples of the intervals."""
    seed: int = 0
    """Of the samples, the orders of the responses, --limit and the bootstrap."""
    skip_bad_rows: bool = False
    """Leave bad rows out and count them, instead of stopping at the first."""


class Judging(Protocol):
    """The two functions of `grm_jax.judging` that stand between this command and a model."""

    def sample_rows(
        self,
        model: Path,
        records: Sequence[Preference],
        options: JudgeOptions,
        progress: ProgressUpdate,
        *,
        meta: Path | None = None,
    ) -> list[SampleRow]:
        """A greedy row and rows 0..k-1 of every record, in any order; `meta` scores them.

        progress: called with the number of samples that were finished, and figures to show.
        """
        ...

    def model_info(self, model: Path) -> dict[str, Any]:
        """What results.json says of the model; `trained`: False for random weights."""
        ...


def evaluate(args: Arguments) -> Results:
    """Load, judge, score, print, save. See `Arguments`.

    Raises:
        DataError, ValueError, OSError: with a message for the user.
    """
    _check(args)
    benchmark = get_benchmark(args.bench)
    data = _data(args)
    records = benchmark.load(
        data, limit=args.limit, seed=args.seed, skip_bad_rows=args.skip_bad_rows
    )
    _say(f"{benchmark.name}: {len(records):,} records from {data}")
    rows, model = _judge(args, records)
    results = assess(
        benchmark,
        records,
        rows,
        judge=_name(args),
        k_meta=args.k_meta,
        ties=args.ties,
        threshold=args.threshold,
        adaptive=args.adaptive is not None,
        resamples=args.resamples,
        seed=args.seed,
        settings={
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(args).items()
            if key != "output"
        },
        model=model,
    )
    print_results(results)
    directory = _output(args)
    # Samples that were read from this very place are not written again.
    known = args.samples is not None and args.samples.parent.resolve() == directory.resolve()
    files = write_report(directory, results, None if known else rows)
    _say(f"written to {directory}: {', '.join(file.name for file in files)}")
    return results


def _judge(
    args: Arguments, records: BenchmarkRecords
) -> tuple[Sequence[SampleRow], dict[str, Any]]:
    """Every sample of every record, and what is known of the model."""
    if args.samples is not None:
        return read_samples(args.samples), {}
    if args.judge is not None:
        return judge_rows(args.judge, records, k=args.k, seed=args.seed), {}
    assert args.model is not None
    return _judge_with_model(args.model, args, records)


def _judge_with_model(
    model: Path, args: Arguments, records: BenchmarkRecords
) -> tuple[Sequence[SampleRow], dict[str, Any]]:
    # Only here, so that judging without a model needs no accelerator and starts at once.
    from grm_jax.judging import JudgeOptions
    from grm_jax.metrics import Progress, setup_logging
    from grm_jax.train import setup_compilation_cache

    setup_compilation_cache()
    judging = cast(Judging, importlib.import_module("grm_jax.judging"))
    setup_logging()
    options = JudgeOptions(
        k=args.k,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        adaptive=args.adaptive,
    )
    progress = Progress("judging", len(records) * (args.k + 1))
    rows = judging.sample_rows(model, records, options, progress.update, meta=args.meta)
    return rows, judging.model_info(model)


def _check(args: Arguments) -> None:
    given = [name for name in ("model", "judge", "samples") if getattr(args, name) is not None]
    if len(given) != 1:
        what = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ValueError(f"give exactly one of --model, --judge and --samples, not {what}")
    if args.meta is not None and args.model is None:
        raise ValueError("--meta guides the votes of a model; give --model too")
    if args.k < 0 or args.resamples < 1 or (args.k_meta is not None and args.k_meta < 1):
        raise ValueError(
            f"--k {args.k} --k-meta {args.k_meta} --resamples {args.resamples}: k is 0 or more, "
            "the others 1 or more"
        )
    if args.adaptive is not None and not 0 <= args.adaptive < 1:
        raise ValueError(f"--adaptive {args.adaptive} is a probability, 0 or more and below 1")
    if args.adaptive is not None and (args.meta is not None or args.judge is not None):
        raise ValueError("--adaptive is for plain votes of a model: leave --meta and --judge out")
    if args.temperature is not None and not args.temperature > 0:
        raise ValueError(
            f"--temperature {args.temperature}: samples of a vote need one above 0; -k 0 judges "
            "greedily only"
        )


def _data(args: Arguments) -> Path:
    """Where the benchmark is: as given, or the run directory above an embedded world's model."""
    if args.data is not None:
        return args.data
    if args.bench == "synthetic":
        start = args.model or Path("runs/tiny")
        for folder in (start, *start.parents):
            if (folder / "world").is_dir():
                return folder / "world"
    raise ValueError(f"give --data: the file or directory of {args.bench}")


def _name(args: Arguments) -> str:
    if args.judge is not None:
        return args.judge
    path = args.model or args.samples
    return str(path)


def _output(args: Arguments) -> Path:
    if args.output is not None:
        return args.output
    if args.samples is not None:
        return args.samples.parent
    folder = "-".join(part for part in Path(_name(args)).parts if part not in ("/", ".", ".."))
    return Path("runs") / "evaluate" / args.bench / folder


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring for the exit status."""
    args = tyro.cli(Arguments, args=argv, prog="python -m grm_jax.evaluate", description=__doc__)
    try:
        evaluate(args)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
