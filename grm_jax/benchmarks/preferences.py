"""Preference records of your own: accuracy overall, by domain and by number of responses.

Reads any file that `data.preferences.read_preferences` takes. Records must have a unique best
response; a single response is labelled 1 (correct) or 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.data.preferences import Preference, read_preferences
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, group_by, prompt_key
from grm_jax.scoring.rules import Form, Rules


def responses_key(record: Preference) -> str:
    """The number of responses, as the name of a figure: "n=2"."""
    return f"n={len(record.responses)}"


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: accuracy; sections: by domain, if there are any; responses: by their number."""
    domains = group_by(records, lambda record: record.domain)
    sizes = group_by(records, responses_key)
    shown = [mean_figure("overall", "accuracy", np.arange(len(records)))]
    if set(domains) != {""}:
        shown += [
            mean_figure("sections", name or "(none)", domains[name]) for name in sorted(domains)
        ]
    shown += [mean_figure("responses", name, sizes[name]) for name in sorted(sizes)]
    return tuple(shown)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All records. A record without a single best label is a bad row here."""
    records = read_preferences(path, skip_bad_rows=skip_bad_rows, unique_best=True)
    return BenchmarkRecords(records, records.skipped, records.notes, records.tied)


BENCHMARK = Benchmark(
    name="preferences",
    about="any preference file: accuracy overall and by domain",
    read=read,
    figures=figures,
    source=Source(
        "give a file or directory of preference records", folders=("preferences", "hh_rlhf")
    ),
    strata=(lambda record: record.domain, responses_key),
    cluster=prompt_key,
)
