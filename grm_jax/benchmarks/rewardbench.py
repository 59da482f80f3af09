"""RewardBench v1 (Lambert et al., arXiv:2403.13787): 2,985 pairs in 23 subsets, 4 sections.

Reads the original schema of allenai/reward-bench (prompt, chosen, rejected, subset, id) and the
renamed one in circulation (question, response_A, response_B, subset, id; A is always the chosen
one), as parquet or JSONL. The chosen response is the first in every file, so responses must be
shown shuffled.

Scores follow the authors' code (`calculate_scores_per_section`, `EXAMPLE_COUNTS`): a section is the
mean of its subsets weighted by *nominal* counts, in which math-prm counts 984 although it has 447
rows, so that math weighs as much as code. The paper of DeepSeek-GRM reports the plain mean of the
four sections, without the prior sets. The leaderboard adds those with half a section's weight, if
there are any.

The authors' protocol for generative judges shows each pair in one random order (not seeded there,
seeded here) and gives ties and unparsable verdicts 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.critique.prompt import Turn
from grm_jax.data.preferences import Preference, parse_row
from grm_jax.data.rows import DataError, show
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, Term, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.rules import Form, Rules

# Section -> subset -> nominal count.
_HEP = ("cpp", "go", "java", "js", "python", "rust")
SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984} | {f"hep-{language}": 164 for language in _HEP},
}
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
PRIOR_WEIGHT = 0.5  # of a section's
ROWS = 2985

_ACTUAL = {"math-prm": 447}  # rows, where they are not the nominal count
_SECTION_OF = {subset: section for section, counts in SECTIONS.items() for subset in counts}
_PRIOR_SECTION = "Prior Sets"
_RENAMED = {"prompt": "question", "chosen": "response_A", "rejected": "response_B"}
_GET = (
    "download allenai/reward-bench from the Hugging Face hub (hf download allenai/reward-bench "
    "--repo-type dataset --local-dir DIR) and give that directory, or its data/filtered-*.parquet"
)
SOURCE = Source(
    _GET,
    folders=("rewardbench", "reward-bench"),
    hub="allenai/reward-bench",
    patterns=("*filtered*.parquet",),
)


def section_of(record: Preference) -> str:
    """The section of a record's subset (`domain`)."""
    return _SECTION_OF.get(record.domain, _PRIOR_SECTION)


def complete(records: Sequence[Preference]) -> bool:
    """Whether the records have all rows of the four sections."""
    return sum(record.domain in _SECTION_OF for record in records) == ROWS


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: the mean, and with prior sets the leaderboard's figure (otherwise it is the same);
    sections; subsets: plain accuracy.

    A subset, section or prior set without records is left out of its mean.
    """
    members = group_by(records, lambda record: record.domain)
    sections: dict[str, tuple[Term, ...]] = {}
    for section, counts in SECTIONS.items():
        present = [subset for subset in counts if subset in members]
        total = sum(counts[subset] for subset in present)
        if present:
            sections[section] = tuple(Term(counts[s] / total, members[s]) for s in present)
    if not sections:
        raise DataError("subset", "no record of RewardBench's four sections", f"give {_known()}")
    mean = tuple(term for terms in sections.values() for term in terms)
    overall = [Figure("overall", "mean", mean)]
    prior = [name for name in PRIOR_SETS if name in members]
    if prior:
        extra = tuple(Term(PRIOR_WEIGHT / len(prior), members[name]) for name in prior)
        overall.append(Figure("overall", "leaderboard", mean + extra))
    return (
        *overall,
        *(Figure("sections", section, terms) for section, terms in sections.items()),
        *(mean_figure("subsets", subset, place) for subset, place in members.items()),
    )


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All pairs of a file or directory; `domain` is the subset, the id is "subset/id".

    In a directory with the layout of the hub, only the `filtered` split is read; `raw` has rows
    that the authors removed.
    """
    paths, notes = _files(path)
    records = collect(rows_of(paths), _parse, path, skip_bad_rows=skip_bad_rows, notes=notes)
    return BenchmarkRecords(records, records.skipped, (*records.notes, *_count_notes(records)))


def _files(path: Path) -> tuple[list[Path], list[str]]:
    paths = files(path, SOURCE, ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.json"))
    split = [file for file in paths if "filtered" in file.name.lower()]
    rest = [file for file in paths if not file.name.lower().startswith("raw")]
    chosen = split or rest
    if not chosen:
        raise DataError("", "no filtered split of RewardBench in this directory", _GET, str(path))
    others = sorted(file.name for file in paths if file not in chosen)
    return chosen, [f"not read: {', '.join(others)}"] if others else []


def _parse(fields: Fields) -> list[Item]:
    subset = fields.text("subset")
    if subset not in _SECTION_OF and subset not in PRIOR_SETS:
        raise fields.wrong("subset", f"unknown: {subset!r}", f"give {_known()}")
    number = fields.key("id")
    renamed = "question" in fields
    if renamed and fields.row.get("label", 1) != 1:
        fix = "response_A must be the chosen one: label 1"
        raise fields.wrong("label", show(fields.row["label"]), fix)
    names = _RENAMED if renamed else {name: name for name in _RENAMED}
    pair = tuple(_reply(fields, names[name]) for name in ("chosen", "rejected"))
    turns = _turns(fields, names["prompt"])
    item = Item(f"{subset}/{number}", turns, pair, (1.0, 0.0), domain=subset, source=fields.where)
    return [item]


def _turns(fields: Fields, name: str) -> tuple[Turn, ...]:
    """The prompt: a text, or in prior sets a list of messages."""
    if not isinstance(fields.get(name, "give the prompt"), list):
        return user(fields.text(name, empty=True))
    try:
        return parse_row({"prompt": fields.row[name], "response": "", "label": 1}).turns
    except DataError as error:
        raise fields.wrong(error.field, error.problem, error.fix) from None


def _reply(fields: Fields, name: str) -> str:
    """A response: a text, or in prior sets a list with one message of the assistant."""
    value = fields.get(name, "give the response")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return fields.checked(f"{name}[0].content", value[0].get("content"), empty=True)
    return fields.text(name, empty=True)


def _count_notes(records: Sequence[Preference]) -> list[str]:
    members = group_by(records, lambda record: record.domain)
    off = []
    for counts in SECTIONS.values():
        for subset, nominal in counts.items():
            expected, count = _ACTUAL.get(subset, nominal), len(members.get(subset, ()))
            if count != expected:
                off.append(f"{subset} {count} of {expected}")
    if not off:
        return []
    shown = ", ".join(off[:6]) + (f" and {len(off) - 6} more" if len(off) > 6 else "")
    return [f"not the official {ROWS:,} rows, so not the official figures: {shown}"]


def _known() -> str:
    return f"one of {', '.join([*_SECTION_OF, *PRIOR_SETS])}"


BENCHMARK = Benchmark(
    name="rewardbench",
    about="RewardBench v1: 2,985 pairs; Chat, Chat Hard, Safety, Reasoning",
    read=read,
    figures=figures,
    source=SOURCE,
    authors=Rules(ties="half", unparsed="half"),
    strata=(section_of, lambda record: record.domain),
    cluster=prompt_key,
)
