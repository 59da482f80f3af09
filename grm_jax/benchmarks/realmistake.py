"""ReaLMistake (Kamoi et al., arXiv:2404.03602): does a response contain an error?

Reads the authors' encrypted `data.zip`, in memory. They ask that no row appears as plain text on
the web, so results and reports have neither rows nor critiques (`private`); only the cache, which
stays on the machine, has critiques. The password is printed in their README. Rows: `input,
llm_response, error_label: "error" | "no_error", metadata`, three tasks x two models.

As in the paper of DeepSeek-GRM, each response is rated alone, 1-10, and the figure is the ROC-AUC
of the rating, for "no error"; a tie counts one half. The paper does not say how the six cells are
pooled, so both ways are reported: over all rows (the headline), and the mean of the cells.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, user
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError, parse_line
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Combined, FigureLike, RocAuc
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.measures import score
from grm_jax.scoring.rules import Form, Rules

TASKS = (
    "math_word_problem_generation",
    "finegrained_fact_verification",
    "answerability_classification",
)
_PASSWORD = b"open-realmistake"  # printed in the authors' README; it is meant against crawlers
SOURCE = Source(
    "clone github.com/psunlpgroup/ReaLMistake and give its data.zip, as it is",
    folders=("realmistake", "ReaLMistake"),
    patterns=("*data.zip",),
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All 900 responses; `domain` is "task, model"; label 1: no error."""
    (archive, *_) = files(path, SOURCE)
    return collect(_rows(archive), _parse, archive, skip_bad_rows=skip_bad_rows)


def _rows(archive: Path) -> Iterator[tuple[str, Callable[[], Fields]]]:
    try:
        with zipfile.ZipFile(archive) as data:
            for name in sorted(data.namelist()):
                if name.endswith(".jsonl") and any(f"/{task}/" in f"/{name}" for task in TASKS):
                    blob = data.read(name, pwd=_PASSWORD)
                    for number, line in enumerate(blob.split(b"\n"), 1):
                        if line.strip():
                            where = f"{archive}:{name}:{number}"
                            yield where, lambda x=line, w=where: Fields(parse_line(x, w), w)
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise DataError("", f"cannot be read: {error}", SOURCE.get, str(archive)) from error


def _parse(fields: Fields) -> list[Item]:
    about = fields.inner("metadata")
    task = next(name for name in TASKS if f"/{name}/" in fields.where)
    model = about.text("llm_response_model").rpartition("/")[2]
    label = fields.choice("error_label", {"error": 0.0, "no_error": 1.0})
    return [
        Item(
            about.key("id"),
            user(fields.text("input", empty=True)),
            (fields.text("llm_response", empty=True),),
            (label,),
            domain=f"{task}, {model}",
            source=fields.where,
        )
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[FigureLike, ...]:
    """overall: ROC-AUC over all rows, and the mean of the cells; sections: the cells."""
    right = np.asarray([record.labels[0] == 1 for record in records])
    everything = np.arange(len(records))

    def auc(group: str, name: str, members: np.ndarray) -> RocAuc:
        return RocAuc(group, name, members[right[members]], members[~right[members]])

    members = group_by(records, lambda record: record.domain)
    cells = [auc("sections", name, members[name]) for name in sorted(members)]
    whole = [cell for cell in cells if len(cell.positives) and len(cell.negatives)]
    mean = [Combined("overall", "ROC-AUC, mean of cells", tuple(whole), "mean")] if whole else []
    return (auc("overall", "ROC-AUC", everything), *mean, *cells)


BENCHMARK = Benchmark(
    name="realmistake",
    about="ReaLMistake: 900 single responses, with or without an error; ROC-AUC of the rating",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={"score": score},
    authors=Rules(unparsed="wrong", form="single"),
    paper=Rules(form="single"),
    forms=("single",),
    rating=True,
    rankings=True,
    fixed=("ties", "order", "threshold"),
    private=True,
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
