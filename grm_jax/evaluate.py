"""Evaluate a judge on benchmarks: figures with 95% intervals, how voting scales with k, a report.

    python -m grm_jax.evaluate --bench rewardbench --data DIR --model RUN --meta RUN -k 32
    python -m grm_jax.evaluate --bench rewardbench,judgebench --data DIR_OF_BOTH --model RUN
    python -m grm_jax.evaluate --bench preferences --data my.jsonl --judge longer
    python -m grm_jax.evaluate --bench rewardbench --data DIR --model RUN --compare OLD_RUN
    python -m grm_jax.evaluate --attacks --model RUN -k 8

Prints one table per benchmark. Writes results.json, table.md, samples.jsonl and accuracy.{png,svg}
to OUTPUT/BENCH (with --scalar also scalar.json, with --attacks card.{md,json,html} and attacks.md),
and report.html, which opens from disk, to OUTPUT. Samples are kept in a cache as they end: a second
run with other aggregation settings samples nothing, and a run that was stopped continues where it
was. Exit status: 0 (also when stopped by SIGTERM), 1 for a mistake that the user can correct (one
line says how), 2 for wrong arguments, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which would be done twice
    from grm_jax.parallel.host import use_huge_pages

    use_huge_pages()

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from grm_jax import stopping
from grm_jax.benchmarks import BENCHMARKS, get_benchmark, rewardbench
from grm_jax.benchmarks.official import write_rewardbench
from grm_jax.benchmarks.sources import locate
from grm_jax.critique import Template
from grm_jax.critique.template_set import Scales
from grm_jax.critique.voting import SCALAR_WEIGHT
from grm_jax.data.attacks import ATTACKS, EMBEDDED_WORLD
from grm_jax.data.critiques import Critique, read_critiques, write_critiques
from grm_jax.data.rows import DataError
from grm_jax.errors import UserError, describe
from grm_jax.evaluate_options import (
    Arguments,
    check,
    check_k_meta,
    require_writable,
    resolved,
)
from grm_jax.output import surviving
from grm_jax.scoring.aggregate import Method, reported
from grm_jax.scoring.assess import assess, compare_runs, judge_scores
from grm_jax.scoring.attack_checks import Check, checks
from grm_jax.scoring.attacks import Asking, attack
from grm_jax.scoring.benchmark import Benchmark
from grm_jax.scoring.calibration import calibration
from grm_jax.scoring.card import Card, grids, write_card
from grm_jax.scoring.html import Evaluated, write_html
from grm_jax.scoring.items import SWAPPED, BenchmarkRecords
from grm_jax.scoring.judges import JUDGE_SCALES, judge_rows
from grm_jax.scoring.report import print_grid, print_results, write_report
from grm_jax.scoring.results import Results, read_results
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.scalar_scores import FILE as SCALAR_FILE
from grm_jax.scoring.scalar_scores import ScalarScores, read_scalar_scores, write_scalar_scores

if TYPE_CHECKING:
    from grm_jax.scoring.sampling import BenchmarkSampler

REPORT = "report.html"


def evaluate(args: Arguments) -> list[Results]:
    """Load the records, judge them, compute the figures, print and save them.

    Raises:
        UserError, OSError: with a message for the user.
    """
    check(args)
    args = resolved(args)
    paths = [(b, locate(b, args.data, args.model)) for b in _benchmarks(args)]
    # Mistakes in files and rules are reported before anything is sampled.
    tasks = [_task(args, benchmark, path) for benchmark, path in paths]
    output = _output(args)
    require_writable(output, "--output")
    judge = None if args.model is None else _sampler(args)
    done: list[Evaluated] = []
    try:
        for task in tasks:
            done.append(_one(args, task, judge, output / task.benchmark.name))
    except KeyboardInterrupt as signal:
        kept = f"; {judge.kept():,} samples are kept in {args.cache}" if judge else ""
        raise stopping.Stopped(
            f"stopped{kept}; the same command continues from there",
            terminated=stopping.terminated(signal),
        ) from None
    finally:
        if done:
            _say(f"report: {write_html(output / REPORT, done, title=_name(args))}")
    return [one.results for one in done]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark that is ready to be judged.

    Attributes:
        rows: the samples of an earlier run (`--samples`), or None.
        about: the results of that run, or None.
        other: the samples of the run that this one is compared with (`--compare`), or None.
        scalar, other_scalar: the scores of a scalar RM beside these samples, or None.
    """

    benchmark: Benchmark
    rules: Rules
    records: BenchmarkRecords
    rows: Sequence[Critique] | None = None
    about: Results | None = None
    other: Sequence[Critique] | None = None
    scalar: ScalarScores | None = None
    other_scalar: ScalarScores | None = None


def _task(args: Arguments, benchmark: Benchmark, path: Path) -> Task:
    rows = about = other = scalar = other_scalar = None
    if args.samples is not None:
        file = _samples_of(args.samples, benchmark)
        rows, beside = read_critiques(file), file.with_name("results.json")
        about = read_results(beside) if beside.exists() else None
        check_k_meta(args.k_meta, rows, file)
        scalar = _scalar_beside(file)
        if args.scalar_weight is not None and scalar is None:
            raise UserError(
                f"--scalar-weight: beside {file} are no scores of a scalar RM; give --model and "
                "--scalar"
            )
    if args.compare is not None:
        file = _samples_of(args.compare, benchmark)
        other, other_scalar = read_critiques(file), _scalar_beside(file)
    rules = _rules(args, benchmark, about)
    benchmark.check(rules)
    records = benchmark.load(
        path,
        rules=rules,
        limit=args.limit,
        seed=args.seed,
        skip_bad_rows=args.skip_bad_rows,
        max_bad_share=args.max_bad_share,
    )
    policy = None if about is None else about.settings["arguments"].get("long_prompts")
    if policy in ("skip", "truncate-middle"):
        judged = {row.example_id for row in rows or ()}
        note = "without the long prompts that the samples' run left out"
        kept = [record for record in records if record.id in judged]
        records = BenchmarkRecords(kept, records.skipped, (*records.notes, note))
    left = f", {len(records.skipped)} rows left out" if records.skipped else ""
    _say(f"{benchmark.name}: {len(records):,} records from {path}{left}")
    return Task(benchmark, rules, records, rows, about, other, scalar, other_scalar)


def _one(args: Arguments, task: Task, judge: BenchmarkSampler | None, directory: Path) -> Evaluated:
    benchmark, rules, records = task.benchmark, task.rules, task.records
    probes: Sequence[Critique] = ()
    scalar = task.scalar
    seconds, about, scales = None, {}, _scales(task)
    adaptive = args.adaptive is not None
    if judge is not None:
        scales = judge.scales(benchmark, rules)
        if args.threshold is None:
            rules = dataclasses.replace(rules, threshold=sum(scales.single) / 2)
        records = judge.fit(benchmark, records, rules)
        scalar = judge.scalar(benchmark, records)
        rows, probes = judge.judge(benchmark, records, rules)
        seconds, about = judge.seconds_per_sample(benchmark, rules), judge.about
    elif task.rows is not None:
        rows = task.rows
        if task.about is not None:
            about = task.about.model
            adaptive = task.about.settings["arguments"].get("adaptive") is not None
    else:
        assert args.judge is not None and args.k is not None
        rows = judge_rows(args.judge, records, k=args.k, seed=args.seed, rating=benchmark.rating)
    # Samples that were read from this file are not written to it again.
    samples = directory / "samples.jsonl"
    if args.samples is None or _samples_of(args.samples, benchmark).resolve() != samples.resolve():
        shown = [dataclasses.replace(row, text="") for row in rows] if benchmark.private else rows
        write_critiques(samples, shown)
        _keep_scalar(directory / SCALAR_FILE, scalar)
    options: dict[str, Any] = {
        "k_meta": args.k_meta, "bound": args.adaptive_bound, "scales": scales,
        "scalar_weight": SCALAR_WEIGHT if args.scalar_weight is None else args.scalar_weight,
    }  # fmt: skip
    beside = {} if scalar is None else scalar.options()
    scored = judge_scores(
        benchmark, records, rows, rules, threshold=rules.threshold, uneven=adaptive, **options,
        **beside,
    )  # fmt: skip
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
        scored=scored,
        **options,
        **beside,
    )
    if unused := [name for name in benchmark.fixed if getattr(args, name) is not None]:
        note = f"--{', --'.join(unused)}: has no effect on how {benchmark.name} is scored"
        results = dataclasses.replace(results, notes=(*results.notes, note))
    if task.other is not None:
        theirs = {} if task.other_scalar is None else task.other_scalar.options()
        against = compare_runs(
            benchmark, records, scored, task.other, str(args.compare), rules=rules,
            resamples=args.resamples, seed=args.seed, threshold=rules.threshold, **options,
            **theirs,
        )  # fmt: skip
        results = dataclasses.replace(results, against=against)
    # The files are written first, since printing may fail.
    files = [samples, *([] if scalar is None else [directory / SCALAR_FILE])]
    files += write_report(directory, results)
    method = reported(scored.aggregate)
    if benchmark.name == "rewardbench":
        files += _official(directory, results, records, method, rules)
    print_results(results)
    if args.attacks:
        card = _card(
            args, judge, Evaluated(benchmark, results, records, rows, method), rules, scales
        )
        files += write_card(directory, card)
        for grid in grids(card)[1:]:  # where the judge is from is in the files
            print_grid(grid)
    names = ", ".join(file.relative_to(directory).as_posix() for file in files)
    _say(f"written to {directory}: {names}")
    return Evaluated(benchmark, results, records, rows, method)


def _card(
    args: Arguments,
    judge: BenchmarkSampler | None,
    found: Evaluated,
    rules: Rules,
    scales: Scales,
) -> Card:
    """Attack the judge, and gather what a card says."""
    benchmark, records = found.benchmark, found.records
    attacks = [*ATTACKS, *(EMBEDDED_WORLD if benchmark.name == "synthetic" else ())]
    own: tuple[Check, ...] = ()
    provenance: dict[str, Any] = {"judge": args.judge}
    if judge is None:
        asking = _asking_without_model(args, benchmark)
    else:
        assert args.attack_k is not None
        options = dataclasses.replace(
            judge.options(benchmark, rules), k=args.attack_k, order="given", adaptive=None
        )
        prompts = judge.prompts(options)
        asking = Asking(
            prompts.template,
            lambda asked: judge.ask(f"attacks on {benchmark.name}", asked, options),
            lambda record: judge.fits(record, options),
        )
        own = checks([prompts.many, prompts.single], prompts.tokenizer)
        provenance = judge.provenance(options)
    assert args.attack_records is not None
    attacked = attack(
        [record for record in records if not record.id.endswith(SWAPPED)],
        attacks,
        asking,
        count=args.attack_records,
        scales=None if judge is None else scales,
        threshold=rules.threshold,
        resamples=args.resamples,
        seed=args.seed,
        checks=own,
    )
    known = calibration(
        records, found.rows, threshold=rules.threshold, clusters=benchmark.clusters(records),
        resamples=args.resamples, seed=args.seed,
    )  # fmt: skip
    return Card(provenance, found.results, attacked, known)


def _asking_without_model(args: Arguments, benchmark: Benchmark) -> Asking:
    """A judge without a model is attacked as if it read the usual templates."""
    assert args.judge is not None and args.attack_k is not None
    name, k = args.judge, args.attack_k
    return Asking(
        lambda record: Template.load("single" if len(record.responses) == 1 else "grm"),
        lambda asked: judge_rows(name, asked, k=k, seed=args.seed, rating=benchmark.rating),
    )


def _scales(task: Task) -> Scales:
    """The score ranges of samples that were read, or of a judge without a model."""
    if task.rows is None:
        return JUDGE_SCALES
    if task.about is not None and (stored := task.about.settings.get("scales")) is not None:
        return Scales(**{name: (low, high) for name, (low, high) in stored.items()})
    # No results beside the samples, or those of an earlier version: the built-in templates' ranges.
    usual = Scales()
    return Scales(single=usual.many) if task.benchmark.rating else usual


def _settings(args: Arguments, task: Task) -> dict[str, Any]:
    """The arguments to store: those about sampling are of the run that drew the samples."""
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(args).items()
        if key != "output"
    }
    if task.about is None:
        return settings
    drawn = ("model", "meta", "scalar", "judge", "k", "temperature", "max_new_tokens", "adaptive",
             "long_prompts", "max_prompt_tokens")  # fmt: skip
    before = task.about.settings["arguments"]
    return {**settings, **{name: before[name] for name in drawn if name in before}}


def _official(
    directory: Path, results: Results, records: BenchmarkRecords, method: Method, rules: Rules
) -> list[Path]:
    """Write RewardBench's two JSON files if its leaderboard would accept the run."""
    cut = any("cut in the middle" in note for note in results.notes)
    if rules.order == "both" or cut or not rewardbench.complete(records):
        _say(
            "rewardbench: no leaderboard files: they need every row, uncut and judged in one order"
        )
        return []
    return write_rewardbench(directory, results.judge, records, method, rules)


def _sampler(args: Arguments) -> BenchmarkSampler:
    # Only here, so that judging without a model needs no accelerator and starts at once.
    from grm_jax.judge.request import JudgeOptions
    from grm_jax.metrics import setup_logging
    from grm_jax.scoring.sampling import BenchmarkSampler
    from grm_jax.train import setup_mesh

    assert args.model is not None and args.cache is not None
    assert args.k is not None and args.probes is not None and args.long_prompts is not None
    require_writable(args.cache, "--cache")
    mesh = setup_mesh(args.mesh)
    setup_logging()
    options = JudgeOptions(
        k=args.k,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        adaptive=args.adaptive,
    )
    return BenchmarkSampler(
        args.model,
        options,
        meta=args.meta,
        scalar=args.scalar,
        cache=args.cache,
        probes=args.probes,
        long_prompts=args.long_prompts,
        max_prompt_tokens=args.max_prompt_tokens,
        mesh=mesh,
        score_tokens=args.score_tokens,
        compute_dtype=args.compute_dtype,
    )


def _benchmarks(args: Arguments) -> list[Benchmark]:
    if args.bench == "all":
        if args.data is None:
            raise UserError("--bench all needs --data: the directory that holds the benchmarks")
        present = [b for b in BENCHMARKS.values() if locate(b, args.data, None, strict=False)]
        if not present:
            raise UserError(f"--data {args.data} holds no folder of a benchmark")
        return present
    names = [name.strip() for name in args.bench.split(",") if name.strip()]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--bench {args.bench!r}: give each benchmark once")
    return [get_benchmark(name) for name in names]


def _rules(args: Arguments, benchmark: Benchmark, about: Results | None) -> Rules:
    """The rules of the protocol, with those given as options in their place.

    Order and form of samples that were read cannot be changed.
    """
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


def _samples_of(path: Path, benchmark: Benchmark) -> Path:
    """The samples.jsonl that `path` means: itself, or in a benchmark's or a run's directory."""
    candidates = (path, path / benchmark.name / "samples.jsonl", path / "samples.jsonl")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        "", f"no samples of {benchmark.name} here", "give the directory of an evaluation of it",
        str(path),
    )  # fmt: skip


def _scalar_beside(samples: Path) -> ScalarScores | None:
    """The scores of a scalar RM that an evaluation left beside its samples, or None."""
    file = samples.with_name(SCALAR_FILE)
    return read_scalar_scores(file) if file.is_file() else None


def _keep_scalar(file: Path, scalar: ScalarScores | None) -> None:
    """Write the scores, or remove those of an earlier evaluation: the samples are others now."""
    if scalar is not None:
        write_scalar_scores(file, scalar)
    else:
        file.unlink(missing_ok=True)


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
    with surviving(), stopping.handled():
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
            sys.exit(f"evaluate: {describe(error)}")


if __name__ == "__main__":
    main()
