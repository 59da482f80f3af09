"""PPE Preference, Preference Proxy Evaluations (Frick et al., arXiv:2410.14872): human votes.

Reads `lmarena-ai/PPE-Human-Preference-V1`: `question_id, prompt, response_1, response_2, winner,
language`. The metric is the accuracy on the rows that are not human ties. The arena's other file
(55k votes: `response_a, winner_model_a, winner_model_b, winner_tie`, lists of turns as JSON) is
read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of, user
from grm_jax.critique.prompt import Turn
from grm_jax.data.preferences import Preference
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.rules import Form, Rules

GET = (
    "download lmarena-ai/PPE-Human-Preference-V1 and lmarena-ai/PPE-{MMLU-Pro,MATH,GPQA,IFEval,"
    "MBPP-Plus}-Best-of-K from the Hugging Face hub, each into a folder of its name, and give the "
    "folder above them"
)
PATTERNS = ("*.parquet", "*.jsonl", "*.json")
SOURCE = Source(
    GET,
    folders=("PPE-Human-Preference-V1", "ppe-preference", "arena55k_sample"),
    hub="lmarena-ai/PPE-Human-Preference-V1",
    patterns=PATTERNS,
)


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """Votes that have a winner; `domain` is the language, if it is given."""
    ties: list[str] = []

    def parse(fields: Fields) -> list[Item]:
        return _vote(fields, ties)

    paths = files(path, SOURCE)
    chosen = [file for file in paths if "best-of-k" not in str(file).lower()] or paths
    records = collect(rows_of(chosen), parse, path, skip_bad_rows=skip_bad_rows)
    notes = [f"{len(ties):,} human ties are not counted, as in the official metric"] if ties else []
    return BenchmarkRecords(records, records.skipped, (*records.notes, *notes))


def _vote(fields: Fields, ties: list[str]) -> list[Item]:
    if "winner" in fields:
        model_a, model_b = fields.text("model_a"), fields.text("model_b")
        winner = fields.text("winner")
        number = fields.key("question_id")
        if winner.startswith("tie"):
            best = None
        elif winner in (model_a, "model_a"):
            best = 0
        elif winner in (model_b, "model_b"):
            best = 1
        else:
            raise fields.wrong("winner", repr(winner), f"give {model_a!r}, {model_b!r} or 'tie'")
        names = ("response_1", "response_2")
    else:
        number = fields.key("id")
        says = [fields.integer(f"winner_{who}", 0, 1) for who in ("model_a", "model_b", "tie")]
        if sum(says) != 1:
            raise fields.wrong("winner_model_a", f"{says}", "just one of the three winners is 1")
        best = None if says[2] else says.index(1)
        names = ("response_a", "response_b")
    turns, replies = _conversation(fields, names)
    if best is None:
        ties.append(number)
        return []
    labels = (1.0, 0.0) if best == 0 else (0.0, 1.0)
    language = fields.row.get("language")
    domain = language if isinstance(language, str) else ""
    return [Item(number, turns, replies, labels, domain=domain, source=fields.where)]


def _conversation(
    fields: Fields, names: tuple[str, str]
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The prompt and two responses, from texts or from JSON lists with one text per turn.

    In a dialogue of several turns the two models share only the questions. A response is then the
    whole rest of the dialogue after the first question, as one text.
    """
    if "winner_model_a" not in fields:  # only the 55k dump has its lists as JSON
        return user(fields.text("prompt", empty=True)), tuple(
            fields.text(n, empty=True) for n in names
        )
    asked = _turns(fields, "prompt")
    replies = [_turns(fields, name) for name in names]
    for name, said in zip(names, replies, strict=True):
        if len(said) != len(asked):
            raise fields.wrong(
                name, f"{len(said)} replies to {len(asked)} turns", "give one reply a turn"
            )
    if len(asked) == 1:
        return user(fields.checked("prompt[0]", asked[0])), (replies[0][0], replies[1][0])
    whole = []
    for said in replies:
        parts = [said[0]]
        for question, answer in zip(asked[1:], said[1:], strict=True):
            parts += [f"User: {question}", f"Assistant: {answer}"]
        whole.append("\n\n".join(parts))
    return user(fields.checked("prompt[0]", asked[0])), (whole[0], whole[1])


def _turns(fields: Fields, name: str) -> list[str]:
    value = fields.decoded(name)
    if not isinstance(value, list) or not value:
        raise fields.wrong(name, "not a list of turns", "give a text or a list of texts")
    # The 55k dump has null where a model said nothing.
    return [
        "" if turn is None else fields.checked(f"{name}[{i}]", turn, empty=True)
        for i, turn in enumerate(value)
    ]


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: accuracy; sections: languages with 20 votes or more."""
    domains = group_by(records, lambda record: record.domain)
    sections = sorted(name for name, members in domains.items() if name and len(members) >= 20)
    return (
        mean_figure("overall", "accuracy", np.arange(len(records))),
        *(mean_figure("sections", name, domains[name]) for name in sections),
    )


BENCHMARK = Benchmark(
    name="ppe-preference",
    about="PPE Human Preference: 16,038 arena votes, accuracy where there is a winner",
    read=read,
    figures=figures,
    source=SOURCE,
    authors=Rules(ties="half", unparsed="half"),
    cluster=prompt_key,
)
