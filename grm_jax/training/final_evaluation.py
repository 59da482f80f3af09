"""The evaluation at the end of the pipeline, on the embedded world: every stage's model on held-out
records.

heldout.jsonl -> greedy and k samples of SFT, RFT, RL (meta scores of RL's) -> votes
              -> scores of the scalar RM -> alone, and added to the votes (hybrid)
              -> one table with intervals, paired differences, an audit, the plot
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax import files
from grm_jax.benchmarks import synthetic
from grm_jax.critique import shuffle
from grm_jax.critique.template_set import Scales
from grm_jax.data.critiques import GREEDY, Critique, write_critiques
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic_audit import Audit, audit_all
from grm_jax.judge.cache import SampleCache, fingerprint
from grm_jax.judge.judge import Judge
from grm_jax.judge.meta import MetaRM
from grm_jax.judge.request import JudgeOptions
from grm_jax.lock import hold
from grm_jax.metrics import Progress
from grm_jax.parallel.multihost import barrier, first
from grm_jax.scoring import report
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.assess import assess, compare
from grm_jax.scoring.results import Results
from grm_jax.scoring.rules import Rules
from grm_jax.scoring.scalar_rm import CALIBRATION, read_threshold, scalar_row
from grm_jax.scoring.scalar_scores import FILE as SCALAR_FILE
from grm_jax.scoring.scalar_scores import ScalarScores, write_scalar_scores
from grm_jax.scoring.statistics import mean_interval
from grm_jax.training.options import Evaluation
from grm_jax.training.run import Run
from grm_jax.training.scalar_rm import reply_scores

log = logging.getLogger("grm_jax")

COLUMNS = (
    "greedy", "sample@1", "vote@4", "vote@8", "vote@16", "vote@32", "meta@8", "meta@16", "meta@32",
    "hybrid@8", "hybrid@32",
)  # fmt: skip
ROWS = {"sft": "SFT", "rft": "RFT", "rl": "RL"}
SCALAR = "scalar (Bradley-Terry)"  # the row of the scalar RM alone; its figure is in "greedy"


def evaluate_pipeline(run: Run, config: Evaluation, batch_size: int) -> dict[str, Any]:
    """Write table, figures and plot to `evaluation/`; returns what summary.json holds.

    Each sample is kept in `evaluation/cache` when it ends, by weights, prompts, settings and seed.
    A sample that is there is not drawn again; those of a model that was trained again are.

    Args:
      batch_size: how many responses the baseline scores at once.
    """
    directory = run.directory / "evaluation"
    hold(run.directory)  # a run whose stages are all done is not held yet
    if first():
        directory.mkdir(parents=True, exist_ok=True)
    barrier("evaluation: begun")
    heldout = synthetic.BENCHMARK.load(run.world)
    fresh = [r for r in heldout if r.domain == synthetic.FRESH][: config.records]
    shifted = [r for r in heldout if r.domain != synthetic.FRESH]
    options = JudgeOptions(k=config.k, order=config.order, seed=run.setup.seed)
    rows: dict[str, list[Critique]] = {}
    for stage in ROWS:
        # The meta RM was trained to guide the RL model; its votes alone are guided.
        judge = make_judge(run, stage, guided=stage == "rl")
        rows[stage] = sample(run, judge, stage, fresh, options, directory / f"{stage}.jsonl")
    plain = make_judge(run, "rl", guided=False)
    on_shifted = sample(run, plain, "rl", shifted, options, directory / "rl_shifted.jsonl")
    scalar = scalar_scores(run, [*fresh, *shifted], batch_size)
    return summarise(run, rows, scalar, on_shifted, fresh, shifted, directory)


def make_judge(run: Run, stage: str, *, guided: bool) -> Judge:
    """The judge with the model of a stage, on the run's mesh."""
    setup, meta = run.setup, None
    if guided:
        meta = MetaRM(
            run.model,
            run.params("meta_rm", num_labels=1),
            run.templates.meta,
            setup.length_buckets,
        )
    return Judge(
        run.model,
        # The weights are read only if a sample is missing.
        lambda: run.params(stage, dtype=run.model.compute_dtype),
        run.tokenizer,
        run.mesh,
        templates=run.templates,
        engine=setup.engine,
        defaults=setup.judge,
        meta=meta,
    )


def sample(
    run: Run,
    judge: Judge,
    stage: str,
    records: Sequence[Preference],
    options: JudgeOptions,
    file: Path,
) -> list[Critique]:
    """Critiques by a stage's model, from the cache if it has them; also written to `file`."""
    directory = run.directory / "evaluation"

    def weights(name: str) -> str:
        return fingerprint(run.model_dir(name), directory / "digests.json", write=first())

    about = {**judge.about(options), "weights": weights(stage)}
    caches = [SampleCache(directory / "cache", about, write=first())]
    if judge.guided:
        digest = run.templates.meta.digest
        about |= {"meta": weights("meta_rm"), "template": digest}
        caches.append(SampleCache(directory / "cache", about, write=first()))
    # Every process has read what is there before the first one adds to it.
    barrier(f"evaluation: {file.name}")
    progress = Progress(f"judging with {ROWS[stage]}", len(records) * (options.k + 1))
    try:
        rows = judge.sample(
            records, options, progress,
            cache=caches[0], meta_cache=caches[1] if judge.guided else None,
        )  # fmt: skip
    finally:
        for cache in caches:
            cache.close()
    if first():
        write_critiques(file, rows)
    return rows


def scalar_scores(run: Run, records: Sequence[Preference], batch_size: int) -> ScalarScores:
    """The scores of the Bradley-Terry baseline, and its threshold for single responses."""
    directory = run.directory / "evaluation"
    scores = reply_scores(run, run.params("scalar_rm", num_labels=1), records, batch_size)
    return ScalarScores(
        dict(zip((record.id for record in records), scores, strict=True)),
        read_threshold(run.directory / "scalar_rm" / CALIBRATION),
        fingerprint(run.model_dir("scalar_rm"), directory / "digests.json", write=first()),
    )


def summarise(
    run: Run,
    rows: Mapping[str, Sequence[Critique]],
    scalar: ScalarScores,
    on_shifted: Sequence[Critique],
    fresh: Sequence[Preference],
    shifted: Sequence[Preference],
    directory: Path,
) -> dict[str, Any]:
    """Print and write the table, paired differences, the audit, and results on shifted records."""
    benchmark = synthetic.BENCHMARK
    scales = Scales(run.templates.many.scale, run.templates.single.scale)
    rules = dataclasses.replace(benchmark.authors, threshold=sum(scales.single) / 2)
    results: dict[str, Results] = {
        ROWS[stage]: assess(
            benchmark,
            fresh,
            critiques,
            judge=ROWS[stage],
            rules=rules,
            scales=scales,
            **scalar.options(),
        )
        for stage, critiques in rows.items()
    }
    alone = [scalar_row(record, scalar.scores[record.id]) for record in fresh]
    compared = math.nan if scalar.threshold is None else scalar.threshold
    results[SCALAR] = assess(
        benchmark, fresh, alone, judge="scalar", rules=Rules(threshold=compared)
    )
    grid = report.comparison_grid(results, methods=COLUMNS)
    if first():
        report.print_grid(grid)
        with files.named(directory):
            report.write_report(directory, results["RL"])
            write_scalar_scores(directory / SCALAR_FILE, scalar)
        with files.written_whole(directory / "table.md") as partial:
            partial.write_text(grid.markdown(), encoding="utf-8")

    voted = {
        stage: aggregate(fresh, sampled, scales=scales, **scalar.options())
        for stage, sampled in rows.items()
    }
    top = max(m.k for m in voted["rl"].methods)
    pairs = [
        ("RL over RFT at one sample", ("rl", "sample@1"), ("rft", "sample@1")),
        ("RFT over SFT at one sample", ("rft", "sample@1"), ("sft", "sample@1")),
        ("RL: vote@8 over one sample", ("rl", "vote@8"), ("rl", "sample@1")),
        (f"RL: vote@{top} over vote@8", ("rl", f"vote@{top}"), ("rl", "vote@8")),
        *(
            (f"RL: meta@{k} over vote@{k}", ("rl", f"meta@{k}"), ("rl", f"vote@{k}"))
            for k in (8, 16, 32)
        ),
        (f"RL: hybrid@{top} over vote@{top}", ("rl", f"hybrid@{top}"), ("rl", f"vote@{top}")),
    ]
    if scalar.threshold is not None:  # without one it does not judge single responses
        name = f"RL: hybrid@{top} over the scalar RM"
        pairs.append((name, ("rl", f"hybrid@{top}"), ("rl", "scalar")))
    summary: dict[str, Any] = {"differences": {}, "audit": {}, "shifted": {}}
    there = {(stage, method.name) for stage, each in voted.items() for method in each.methods}
    for name, (a, one), (b, other) in pairs:
        if not {(a, one), (b, other)} <= there:
            continue
        difference = compare(
            benchmark,
            fresh,
            voted[a].method(one).credits(fresh, rules),
            voted[b].method(other).credits(fresh, rules),
        )
        summary["differences"][name] = vars(difference) | {}
        log.info("%-30s %s", name, report.signed(difference))
    for stage, sampled in rows.items():
        checked = audit_rows(fresh, sampled)
        summary["audit"][stage] = {
            "false_alarm_rate": checked.false_alarm_rate,
            "recall": checked.recall,
        }
        log.info(
            "%-30s false alarms %.1f%%, faults found %.1f%% of those checked",
            ROWS[stage], 100 * checked.false_alarm_rate, 100 * checked.recall,
        )  # fmt: skip
    for name in sorted({record.domain for record in shifted}):
        records = [record for record in shifted if record.domain == name]
        ids = {record.id for record in records}
        tables = aggregate(
            records, [row for row in on_shifted if row.example_id in ids], scales=scales,
            **scalar.options(),
        )  # fmt: skip
        shown = {}
        for method in tables.methods:
            credits = [c for c in method.credits(records, rules).values() if not math.isnan(c)]
            if credits:
                shown[method.name] = mean_interval(credits)
        summary["shifted"][name] = {method: vars(value) for method, value in shown.items()}
        text = "  ".join(f"{method} {report.cell(value)}" for method, value in shown.items())
        log.info("RL on unseen %-17s %s", name, text)
    summary["figures"] = {
        label: {m.name: vars(m.figures[r.headline[0]][r.headline[1]]) for m in r.methods}
        for label, r in results.items()
    }
    summary["records"] = len(fresh)
    text = json.dumps(summary, indent=2) + "\n"
    if first():
        with files.written_whole(directory / "summary.json") as partial:
            partial.write_text(text, encoding="utf-8")
    log.info("written to %s: table.md, summary.json, accuracy.png", directory)
    return summary


def audit_rows(records: Sequence[Preference], rows: Sequence[Critique]) -> Audit:
    """Compare the checks that sampled critiques report with the true ones."""
    by_id = {record.id: record for record in records}
    return audit_all(
        (row.text, by_id[row.example_id].query, shuffle(by_id[row.example_id].responses, row.order))
        for row in rows
        if row.sample != GREEDY and row.sample < 4 and row.failure is None
    )
