"""The embedded world's held-out records (`data.synthetic_files` writes them).

Domains: `fresh` (new records of the training distribution), `operands` (operand pairs that are not
in the training data) and `combinations` (pairs of a task and a wish that are not); of a world that
leaves them out of training, `task` (a task that is not) and `defect` (a kind of defect that is
not). The headline is the accuracy on `fresh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grm_jax.benchmarks import preferences
from grm_jax.benchmarks.preferences import responses_key
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, group_by
from grm_jax.scoring.rules import Form, Rules

FILE = "heldout.jsonl"
FRESH = "fresh"
DOMAINS = (FRESH, "operands", "combinations", "task", "defect")


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: accuracy on `fresh`; sections: by domain; responses: `fresh` by their number."""
    domains = group_by(records, lambda record: record.domain)
    if FRESH not in domains:
        raise DataError("domain", f"no record of {FRESH!r}", "give the whole held-out file")
    sizes = group_by(
        records, lambda record: responses_key(record) if record.domain == FRESH else ""
    )
    return (
        mean_figure("overall", FRESH, domains[FRESH]),
        *(mean_figure("sections", name, domains[name]) for name in DOMAINS if name in domains),
        *(mean_figure("responses", name, sizes[name]) for name in sorted(sizes) if name),
    )


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """The records of `<path>/heldout.jsonl`, of a run's `<path>/world/heldout.jsonl`, or a file."""
    candidates = (path, path / FILE, path / "world" / FILE)
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise DataError(
            "",
            f"no {FILE} here",
            "give the world/ folder of a run on the embedded world: `python -m grm_jax.train "
            "--config spct.py` writes one",
            str(path),
        )
    records = preferences.read(file, skip_bad_rows, form)
    for record in records:
        if record.domain not in DOMAINS:
            raise DataError(
                "domain",
                f"{record.domain!r}",
                f"the embedded world has {', '.join(DOMAINS)}; for other records use the "
                "`preferences` benchmark",
                record.source,
            )
    return records


BENCHMARK = Benchmark(
    name="synthetic",
    about="the embedded world's held-out records: fresh, operands, combinations, task, defect",
    read=read,
    figures=figures,
    source=Source("train on the embedded world, which writes it", folders=("world",)),
    strata=(lambda record: record.domain, responses_key),
)
