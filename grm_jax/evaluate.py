"""Evaluate a judge on benchmarks: figures with 95% intervals, how voting scales with k, a report.

    python -m grm_jax.evaluate --bench rewardbench --data DIR --model RUN --meta RUN -k 32
    python -m grm_jax.evaluate --bench rewardbench,judgebench --data DIR_OF_BOTH --model RUN
    python -m grm_jax.evaluate --bench preferences --data my.jsonl --judge longer
    python -m grm_jax.evaluate --bench rewardbench --data DIR --model RUN --compare OLD_RUN

Prints a table a benchmark and writes, to OUTPUT/BENCH, results.json, table.md, samples.jsonl and
accuracy.{png,svg}; to OUTPUT, report.html, which opens from disk. Samples are kept in a cache as
they end: a second run with other aggregation settings samples nothing, and one that was stopped
goes on. Exit status: 0 (also when stopped by SIGTERM), 1 for what can be mended (one line says
how), 2 for wrong arguments, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from grm_jax import stopping
from grm_jax.benchmarks import BENCHMARKS, get_benchmark, rewardbench
from grm_jax.benchmarks.aggregate import Method, Scales, aggregate, reported
from grm_jax.benchmarks.assess import assess, compare_runs
from grm_jax.benchmarks.base import Benchmark, BenchmarkRecords
from grm_jax.benchmarks.html import Evaluated, write_html
from grm_jax.benchmarks.judges import JudgeName, judge_rows
from grm_jax.benchmarks.long_prompts import LongPrompts
from grm_jax.benchmarks.official import write_rewardbench
from grm_jax.benchmarks.report import print_results, write_report
from grm_jax.benchmarks.results import Results, read_results
from grm_jax.benchmarks.rules import Form, OrderRule, Protocol, Rules, TieRule, UnparsedRule
from grm_jax.benchmarks.samples import SampleRow, read_samples, write_samples
from grm_jax.benchmarks.sources import locate
from grm_jax.benchmarks.statistics import RESAMPLES
from grm_jax.critique.adaptive import BOUND
from grm_jax.data.rows import DataError
from grm_jax.errors import UserError, describe, is_users
from grm_jax.parallel.options import MeshConfig

if TYPE_CHECKING:
    from grm_jax.model_judge import ModelJudge

REPORT = "report.html"
K = 32
PROBES = 32
CACHE = Path("runs/cache")
# Least values of options, and those that without a model would say nothing.
LEAST = {
    "k": 0, "probes": 0, "seed": 0, "k_meta": 1, "resamples": 1, "limit": 1, "max_new_tokens": 1,
    "max_prompt_tokens": 1, "score_tokens": 1,
}  # fmt: skip
OF_MODELS = (
    "temperature", "max_new_tokens", "long_prompts", "max_prompt_tokens", "adaptive", "probes",
    "cache", "score_tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exactly one of --model, --judge and --samples says who judges."""

    bench: str
    """Benchmark, several with commas, or `all` that --data holds. rewardbench, rewardbench2,
    ppe-preference, ppe-correctness, rmb, realmistake, rm-bench, judgebench, llmbar, pandalm, hhh,
    synthetic (the embedded world), preferences (any preference file)."""
    data: Path | None = None
    """Its file or directory, or one above the directories of several. Default: the Hugging Face
    hub, where the benchmark is there; for the embedded world the run that the model is of."""
    model: Path | None = None
    """Generative reward model: a run directory, a model directory, a Hugging Face one or a repo id
    of the hub."""
    meta: Path | None = None
    """Meta RM that guides the votes; only with --model."""
    judge: JudgeName | None = None
    """A judge without a model: `longer` (more characters win) or `random`."""
    samples: Path | None = None
    """samples.jsonl of an earlier evaluation (or its directory), to compute its figures again."""
    k: Annotated[int | None, tyro.conf.arg(aliases=("-k",))] = None
    """Samples a record, besides the greedy one; 0: only that one. Default: 32; of --samples, what
    was drawn."""
    temperature: float | None = None
    """Of the k samples; default: the judge's own, else 0.5, at which the paper votes."""
    max_new_tokens: int | None = None
    """Length limit of a critique, in tokens; default: the judge's own, else 1024."""
    long_prompts: LongPrompts | None = None
    """Prompts that leave no room for a critique: stop before sampling (error, the default), cut the
    middle out of the longest texts, or leave the item out; both are counted in the results."""
    max_prompt_tokens: int | None = None
    """Prompts with more tokens are long; default: as many as the model's positions allow."""
    adaptive: float | None = None
    """Stop sampling a record once the probability that further samples up to k change its verdict
    is at most this, e.g. 0.01; 0: only when they can not. Not cached."""
    adaptive_bound: float = BOUND
    """The same for the row `adaptive@k`, which is computed from k samples that were drawn."""
    k_meta: tuple[int, ...] = ()
    """Samples that guided votes keep, besides half of their k, as in the paper."""
    protocol: Protocol = "authors"
    """Rules for ties, unreadable critiques, order and form: of each benchmark's authors, or the
    paper's for all. The next five replace single ones."""
    ties: TieRule | None = None
    """The top shared by several: wrong, half, shared or random (1 / sharers), excluded."""
    unparsed: UnparsedRule | None = None
    """No readable critique: wrong, half, chance (1 / responses), excluded."""
    order: OrderRule | None = None
    """Responses as in the file (fixed), shuffled (random), or pairs in both orders (both)."""
    form: Form | None = None
    """What a question shows, where a benchmark has several: all responses (list), pairs, single."""
    threshold: float | None = None
    """Single responses: a mean score above it says correct; default: the middle of the range of
    the judge's template for single responses."""
    compare: Path | None = None
    """Directory of an earlier evaluation: paired differences to it."""
    limit: int | None = None
    """Judge only so many items: a random sample in which every section is present."""
    probes: int | None = None
    """Records with two identical responses that a model judges too, for the bias table. Default:
    32."""
    cache: Path | None = None
    """Where samples of a model are kept. Default: runs/cache."""
    mesh: MeshConfig = MeshConfig()
    """How a model uses the devices, as in training: `--mesh.tensor 2` splits it over two."""
    score_tokens: int | None = None
    """Most tokens of critiques that the meta RM scores at once on a device. Default: as many as
    the judge computes of its prompts (8192, or as trained)."""
    output: Path | None = None
    """Directory of the results; default: runs/evaluate/JUDGE, or that of --samples."""
    resamples: int = RESAMPLES
    """Bootstrap resamples of the intervals."""
    seed: int = 0
    """Of the samples, the orders of the responses, --limit and the bootstrap."""
    skip_bad_rows: bool = False
    """Leave bad rows out and count them, instead of stopping at the first."""


def evaluate(args: Arguments) -> list[Results]:
    """Load, judge, score, print, save. See `Arguments`.

    Raises:
        DataError, ValueError, OSError: with a message for the user.
    """
    _check(args)
    args = _resolved(args)
    todo = [(b, locate(b, args.data, args.model)) for b in _benchmarks(args)]
    # All that can be wrong with files and rules is found before anything is sampled.
    tasks = [_task(args, benchmark, path) for benchmark, path in todo]
    output = _output(args)
    _require_writable(output, "--output")
    judge = None if args.model is None else _model_judge(args)
    done: list[Evaluated] = []
    try:
        for task in tasks:
            done.append(_one(args, task, judge, output / task.benchmark.name))
    except KeyboardInterrupt as signal:
        kept = f"; {judge.kept():,} samples are kept in {args.cache}" if judge else ""
        raise stopping.Stopped(
            f"stopped{kept}; the same command goes on from there",
            terminated=stopping.terminated(signal),
        ) from None
    finally:
        if done:
            _say(f"report: {write_html(output / REPORT, done, title=_name(args))}")
    return [one.results for one in done]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark, ready to be judged.

    Attributes:
        rows: samples of an earlier run, and `about`, its results; or none.
        other: samples of the run that this one is compared with, or none.
    """

    benchmark: Benchmark
    rules: Rules
    records: BenchmarkRecords
    rows: Sequence[SampleRow] | None = None
    about: Results | None = None
    other: Sequence[SampleRow] | None = None


def _task(args: Arguments, benchmark: Benchmark, path: Path) -> Task:
    rows = about = other = None
    if args.samples is not None:
        file = _samples_of(args.samples, benchmark)
        rows, beside = read_samples(file), file.with_name("results.json")
        about = read_results(beside) if beside.exists() else None
        _check_k_meta(args.k_meta, rows, file)
    if args.compare is not None:
        other = read_samples(_samples_of(args.compare, benchmark))
    rules = _rules(args, benchmark, about)
    benchmark.check(rules)
    records = benchmark.load(
        path, rules=rules, limit=args.limit, seed=args.seed, skip_bad_rows=args.skip_bad_rows
    )
    if about is not None and about.settings["arguments"].get("long_prompts") == "skip":
        judged = {row.example_id for row in rows or ()}
        note = "without the long prompts that the samples' run left out"
        kept = [record for record in records if record.id in judged]
        records = BenchmarkRecords(kept, records.skipped, (*records.notes, note))
    left = f", {len(records.skipped)} bad rows left out" if records.skipped else ""
    _say(f"{benchmark.name}: {len(records):,} records from {path}{left}")
    return Task(benchmark, rules, records, rows, about, other)


def _one(args: Arguments, task: Task, judge: ModelJudge | None, directory: Path) -> Evaluated:
    benchmark, rules, records = task.benchmark, task.rules, task.records
    probes: Sequence[SampleRow] = ()
    seconds, about, scales = None, {}, Scales()
    if benchmark.rating:
        scales = Scales(single=scales.many)
    adaptive = args.adaptive is not None
    if judge is not None:
        records = judge.fit(benchmark, records, rules)
        rows, probes = judge.judge(benchmark, records, rules)
        seconds, about = judge.seconds_per_sample(benchmark, rules), judge.about
        scales = judge.scales(benchmark, rules)
        if args.threshold is None:
            rules = dataclasses.replace(rules, threshold=sum(scales.single) / 2)
    elif task.rows is not None:
        rows = task.rows
        if task.about is not None:
            about = task.about.model
            adaptive = task.about.settings["arguments"].get("adaptive") is not None
    else:
        assert args.judge is not None and args.k is not None
        rows = judge_rows(args.judge, records, k=args.k, seed=args.seed, rating=benchmark.rating)
    # Samples that were read from this very place are not written again.
    samples = directory / "samples.jsonl"
    if args.samples is None or _samples_of(args.samples, benchmark).resolve() != samples.resolve():
        shown = [dataclasses.replace(row, text="") for row in rows] if benchmark.private else rows
        write_samples(samples, shown)
    options: dict[str, Any] = {
        "k_meta": args.k_meta, "bound": args.adaptive_bound, "scales": scales
    }  # fmt: skip
    results = assess(
        benchmark,
        records,
        rows,
        judge=_name(args) if task.about is None else task.about.judge,
        rules=rules,
        adaptive=adaptive,
        resamples=args.resamples,
        seed=args.seed,
        probes=probes,
        seconds_per_sample=seconds,
        settings=_settings(args, task),
        model=about,
        **options,
    )
    if unused := [name for name in benchmark.fixed if getattr(args, name) is not None]:
        note = f"--{', --'.join(unused)}: no part of how {benchmark.name} is scored"
        results = dataclasses.replace(results, notes=(*results.notes, note))
    if task.other is not None:
        against = compare_runs(
            benchmark, records, rows, task.other, str(args.compare), rules=rules,
            resamples=args.resamples, seed=args.seed, adaptive=adaptive, **options,
        )  # fmt: skip
        results = dataclasses.replace(results, against=against)
    print_results(results)
    files = [samples, *write_report(directory, results)]
    method = reported(aggregate(records, rows, uneven=adaptive, **options))
    if benchmark.name == "rewardbench":
        files += _official(directory, results, records, method, rules)
    names = ", ".join(file.relative_to(directory).as_posix() for file in files)
    _say(f"written to {directory}: {names}")
    return Evaluated(results, records, rows, method)


def _settings(args: Arguments, task: Task) -> dict[str, Any]:
    """The arguments; of samples that were read, those of the run that drew them."""
    own = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(args).items()
        if key != "output"
    }
    if task.about is None:
        return own
    drawn = ("model", "meta", "judge", "k", "temperature", "max_new_tokens", "adaptive",
             "long_prompts", "max_prompt_tokens")  # fmt: skip
    before = task.about.settings["arguments"]
    return {**own, **{name: before[name] for name in drawn if name in before}}


def _official(
    directory: Path, results: Results, records: BenchmarkRecords, method: Method, rules: Rules
) -> list[Path]:
    """RewardBench's two JSON files, where the run is what its board takes."""
    cut = any("cut in the middle" in note for note in results.notes)
    if rules.order == "both" or cut or not rewardbench.complete(records):
        _say("rewardbench: no files for its board: not one game of each of its rows as they are")
        return []
    return write_rewardbench(directory, results.judge, records, method, rules)


def _model_judge(args: Arguments) -> ModelJudge:
    # Only here, so that judging without a model needs no accelerator and starts at once.
    from grm_jax.judging import JudgeOptions
    from grm_jax.metrics import setup_logging
    from grm_jax.model_judge import ModelJudge
    from grm_jax.train import setup_compilation_cache, setup_devices, setup_numbers

    assert args.model is not None and args.cache is not None
    assert args.k is not None and args.probes is not None and args.long_prompts is not None
    _require_writable(args.cache, "--cache")
    mesh = None
    if args.mesh == MeshConfig():
        setup_compilation_cache()
        setup_numbers()
    else:
        from grm_jax.parallel.mesh import make_mesh

        setup_devices(args.mesh.cpu_devices)
        mesh = make_mesh(
            args.mesh.replica, args.mesh.fsdp, args.mesh.tensor, sequence=args.mesh.sequence
        )
    setup_logging()
    options = JudgeOptions(
        k=args.k,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        adaptive=args.adaptive,
    )
    return ModelJudge(
        args.model,
        options,
        meta=args.meta,
        cache=args.cache,
        probes=args.probes,
        long_prompts=args.long_prompts,
        max_prompt_tokens=args.max_prompt_tokens,
        mesh=mesh,
        score_tokens=args.score_tokens,
    )


def _benchmarks(args: Arguments) -> list[Benchmark]:
    if args.bench == "all":
        if args.data is None:
            raise UserError("--bench all needs --data: the directory that holds the benchmarks")
        found = [b for b in BENCHMARKS.values() if locate(b, args.data, None, strict=False)]
        if not found:
            raise UserError(f"--data {args.data} holds no folder of a benchmark")
        return found
    names = [name.strip() for name in args.bench.split(",") if name.strip()]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--bench {args.bench!r}: give each benchmark once")
    return [get_benchmark(name) for name in names]


def _rules(args: Arguments, benchmark: Benchmark, about: Results | None) -> Rules:
    """The protocol's rules with those that were given; order and form of samples that were drawn
    are theirs."""
    base = benchmark.authors if args.protocol == "authors" else benchmark.paper
    if about is not None:
        drawn = {name: about.settings["rules"][name] for name in ("order", "form")}
        base = dataclasses.replace(base, threshold=about.settings["rules"]["threshold"])
        for name, value in drawn.items():
            if getattr(args, name) not in (None, value):
                raise UserError(
                    f"--{name} {getattr(args, name)}: these samples were drawn with {value!r}; "
                    "give --model to draw others"
                )
        return dataclasses.replace(base, **{**_given(args), **drawn})
    return dataclasses.replace(base, **_given(args))


def _given(args: Arguments) -> dict[str, Any]:
    return {
        name: value
        for name in ("ties", "unparsed", "order", "form", "threshold")
        if (value := getattr(args, name)) is not None
    }


def _check(args: Arguments) -> None:
    given = [name for name in ("model", "judge", "samples") if getattr(args, name) is not None]
    if len(given) != 1:
        what = " and ".join(f"--{name}" for name in given) or "none of them"
        raise UserError(f"give exactly one of --model, --judge and --samples, not {what}")
    if args.meta is not None and args.model is None:
        raise UserError("--meta guides the votes of a model; give --model too")
    for name, least in LEAST.items():
        value = getattr(args, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and one < least:
                raise UserError(f"{_option(name)} {one}: give {least} or more")
    if len(set(args.k_meta)) < len(args.k_meta):
        raise UserError(f"--k-meta {' '.join(map(str, args.k_meta))}: give each number once")
    for name in ("threshold", "temperature", "adaptive", "adaptive_bound"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{_option(name)} {value}: give a number")
    if args.model is None:
        for name in OF_MODELS:
            if getattr(args, name) is not None:
                raise UserError(f"{_option(name)} is for --model, which samples")
        if args.mesh != MeshConfig():
            raise UserError("--mesh is for --model, which is computed on devices")
    if args.samples is not None and args.k is not None:
        raise UserError(
            f"--k {args.k}: samples that were drawn are all used; give --model to draw others"
        )
    if args.score_tokens is not None and args.meta is None:
        raise UserError("--score-tokens is of the meta RM; give --meta too")
    if args.k_meta and args.samples is None:
        if args.meta is None:
            raise UserError("--k-meta is of votes that a meta RM guides; give --meta too")
        k = K if args.k is None else args.k
        if max(args.k_meta) > k:
            raise UserError(f"--k-meta {max(args.k_meta)} of --k {k} samples")
    if not 0 <= args.adaptive_bound < 1:
        raise UserError(
            f"--adaptive-bound {args.adaptive_bound} is a probability, 0 or more and below 1"
        )
    if args.adaptive is not None and not 0 <= args.adaptive < 1:
        raise UserError(f"--adaptive {args.adaptive} is a probability, 0 or more and below 1")
    if args.adaptive is not None and args.meta is not None:
        raise UserError("--adaptive is for plain votes of a model: leave --meta out")
    if args.temperature is not None and not args.temperature > 0:
        raise UserError(
            f"--temperature {args.temperature}: samples of a vote need one above 0; -k 0 judges "
            "greedily only"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _resolved(args: Arguments) -> Arguments:
    """With the defaults of options that were not given."""
    return dataclasses.replace(
        args,
        k=K if args.k is None else args.k,
        probes=PROBES if args.probes is None else args.probes,
        long_prompts=args.long_prompts or "error",
        cache=args.cache or CACHE,
    )


def _check_k_meta(k_meta: Sequence[int], rows: Sequence[SampleRow], file: Path) -> None:
    """Raise UserError unless votes of these samples can keep so many."""
    if not k_meta:
        return
    if all(row.meta is None for row in rows):
        raise UserError(f"--k-meta: {file} has no scores of a meta RM; give --model and --meta")
    drawn = max(row.sample for row in rows) + 1
    if max(k_meta) > drawn:
        raise UserError(f"--k-meta {max(k_meta)}: {file} has {drawn} samples a record")


def _require_writable(directory: Path, option: str) -> None:
    """Raise UserError when the directory can not be written or made; makes nothing."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} {directory}: {place} is no directory; give another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {directory}: {place} can not be written; give another")


def _samples_of(path: Path, benchmark: Benchmark) -> Path:
    """samples.jsonl of a file, of a benchmark's directory, or of a run's."""
    candidates = (path, path / benchmark.name / "samples.jsonl", path / "samples.jsonl")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        "", f"no samples of {benchmark.name} here", "give the directory of an evaluation of it",
        str(path),
    )  # fmt: skip


def _name(args: Arguments) -> str:
    return args.judge or str(args.model or args.samples)


def _output(args: Arguments) -> Path:
    if args.output is not None:
        return args.output
    if args.samples is not None:
        folder = args.samples if args.samples.is_dir() else args.samples.parent
        return folder.parent if (folder / "samples.jsonl").exists() else folder
    folder = "-".join(part for part in Path(_name(args)).parts if part not in ("/", ".", ".."))
    return Path("runs") / "evaluate" / folder


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring for the exit status."""
    with stopping.handled():
        try:
            args = tyro.cli(
                Arguments, args=argv, prog="python -m grm_jax.evaluate", description=__doc__
            )
            evaluate(args)
        except stopping.Stopped as stopped:
            print(f"evaluate: {stopped}", file=sys.stderr)
            sys.exit(stopping.exit_code(stopped.terminated))
        except KeyboardInterrupt as signal:
            print("evaluate: stopped; nothing was sampled yet", file=sys.stderr)
            sys.exit(stopping.exit_code(stopping.terminated(signal)))
        except (UserError, OSError) as error:
            if not is_users(error):
                raise
            sys.exit(f"evaluate: {describe(error)}")


if __name__ == "__main__":
    main()
