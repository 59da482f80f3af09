"""RMB (Zhou et al., arXiv:2410.09893): helpfulness and harmlessness, pairs and best-of-n.

Reads the repository's folders (Pairwise_set and BoN_set, each with Helpfulness and Harmlessness).
Pairs: `pair_uid, conversation_input, chosen: {answer}, reject: {answer}`; best-of-n: `bon_uid,
conversation_input, bon_best: {answer}, loser_list: [{answer}]`.

The headline is the plain mean of {Help, Harm} x {BoN, Pair}, each a mean over rows.

    form "pairs"  best-of-n as n - 1 pairs, all of which must be right (authors; a tie is a miss)
    form "list"   all n responses in one list, the best must win (paper of DeepSeek-GRM)

The best response is the first in every file, so responses must be shown shuffled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from grm_jax.benchmarks.reading import Fields, collect, files, rows_of
from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import read_conversation
from grm_jax.data.preferences import Preference
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark, Source
from grm_jax.scoring.figures import Figure, Term, mean_figure
from grm_jax.scoring.items import BenchmarkRecords, Item, group_by, prompt_key
from grm_jax.scoring.measures import all_right
from grm_jax.scoring.rules import Form, Rules

SECTIONS = ("Help-BoN", "Help-Pair", "Harm-BoN", "Harm-Pair")
_GET = (
    "clone github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark and give its RMB_dataset folder, with "
    "Pairwise_set and BoN_set"
)
SOURCE = Source(_GET, folders=("RMB_dataset", "rmb"), patterns=("*.json", "*.jsonl"))


def read(path: Path, skip_bad_rows: bool, form: Form) -> BenchmarkRecords:
    """All rows of both sets; `domain` is one of the four sections."""
    records: list[Preference] = []
    skipped: list[str] = []
    empty: list[str] = []
    for file in files(path, SOURCE):
        parse = functools.partial(_parse, side=_side(file), form=form, empty=empty)
        of_file = collect(rows_of([file]), parse, file, skip_bad_rows=skip_bad_rows)
        records += of_file
        skipped += of_file.skipped
    if len({record.id for record in records}) < len(records):
        seen: dict[str, str] = {}
        for record in records:
            if record.id in seen:
                raise DataError(
                    "pair_uid", f"{record.id!r} is already the id of {seen[record.id]}",
                    "give each file once", record.source,
                )  # fmt: skip
            seen[record.id] = record.source
    notes = [f"{len(empty)} empty responses are judged as they are"] if empty else []
    missing = [name for name in SECTIONS if all(r.domain != name for r in records)]
    if missing:
        notes.append(f"not all of RMB, so not its figure: no rows of {', '.join(missing)}")
    return BenchmarkRecords(records, skipped, notes)


def _side(file: Path) -> str:
    """ "Help" or "Harm", by the nearest folder (or the file's name) that says so."""
    for part in reversed(file.parts):
        for side in ("Help", "Harm"):
            if side.lower() in part.lower() and not part.lower().startswith("rmb"):
                return side
    raise DataError(
        "", "neither Helpfulness nor Harmlessness in its path", "keep the authors' folders",
        str(file),
    )  # fmt: skip


def _parse(fields: Fields, *, side: str, form: Form, empty: list[str]) -> list[Item]:
    turns = _turns(fields)
    if "bon_uid" in fields:
        number, domain = fields.key("bon_uid"), f"{side}-BoN"
        best = _answer(fields.inner("bon_best"), empty)
        losers = _losers(fields, empty)
    else:
        number, domain = fields.key("pair_uid"), f"{side}-Pair"
        best = _answer(fields.inner("chosen"), empty)
        losers = [_answer(fields.inner("reject"), empty)]
    name = f"{domain}/{number}"

    def item(id: str, others: Sequence[str], place: str) -> Item:
        labels = (1.0,) + (0.0,) * len(others)
        return Item(
            id, turns, (best, *others), labels, domain=domain, source=fields.where, item=name,
            place=place,
        )  # fmt: skip

    if form == "list" or len(losers) == 1:
        return [item(name, losers, "")]
    return [item(f"{name}/{i}", [loser], str(i)) for i, loser in enumerate(losers)]


def _turns(fields: Fields) -> tuple[Turn, ...]:
    value = fields.get("conversation_input", "give a list of messages")
    if not isinstance(value, list):
        raise fields.wrong("conversation_input", type(value).__name__, "give a list of messages")
    try:
        return read_conversation("conversation_input", value)
    except DataError as error:
        raise fields.wrong(error.field, error.problem, error.fix) from None


def _losers(fields: Fields, empty: list[str]) -> list[str]:
    value = fields.get("loser_list", "give a list of objects with an answer")
    if not isinstance(value, list) or not value or any(not isinstance(x, dict) for x in value):
        raise fields.wrong(
            "loser_list", str(value)[:60], "give a list of objects with an answer, one or more"
        )
    return [
        _answer(Fields({f"loser_list[{i}].answer": loser.get("answer")}, fields.where), empty,
                f"loser_list[{i}].answer")
        for i, loser in enumerate(value)
    ]  # fmt: skip


def _answer(fields: Fields, empty: list[str], name: str = "answer") -> str:
    text = fields.text(name, empty=True)
    if not text.strip():  # the authors' files hold two
        empty.append(fields.where)
    return text


def figures(records: Sequence[Preference], rules: Rules) -> tuple[Figure, ...]:
    """overall: the mean of those of the four sections that have rows; sections: each of them."""
    members = group_by(records, lambda record: record.domain)
    names = [name for name in SECTIONS if name in members]
    terms = tuple(Term(1.0, members[name], "all right") for name in names)
    sections = (mean_figure("sections", name, members[name], "all right") for name in names)
    return (Figure("overall", "mean", terms), *sections)


BENCHMARK = Benchmark(
    name="rmb",
    about="RMB: 17,131 pairs and 3,786 best-of-n rows; helpfulness, harmlessness",
    read=read,
    figures=figures,
    source=SOURCE,
    measures={"all right": all_right},
    authors=Rules(ties="wrong", unparsed="wrong", form="pairs"),
    forms=("pairs", "list"),
    strata=(lambda record: record.domain,),
    cluster=prompt_key,
)
