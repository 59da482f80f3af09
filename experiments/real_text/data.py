"""Makes training and held-out records from public preference files.

    python experiments/real_text/data.py --data DATA --output runs/real_text/data

    files -> records -> without ties, doubles and benchmark prompts -> split by prompt
          -> train.jsonl, heldout.jsonl, attributes.jsonl, about.json

`--data` is a folder that holds these files, each in the sub-folder named here. What is missing is
an error unless `--sources` names fewer:

    hh_rlhf/harmless-base/test.jsonl.gz   Anthropic/hh-rlhf, MIT
    hh_rlhf/helpful*.jsonl                Anthropic/hh-rlhf, MIT
    arena55k_sample/*.jsonl               lmsys/lmsys-arena-human-preference-55k, Apache-2.0
    helpsteer1_sample/*.jsonl             nvidia/HelpSteer, CC-BY-4.0

A record's `domain` is its source. HelpSteer's rated responses to a prompt become one record of up
to four responses, labelled by helpfulness; its other ratings are kept in attributes.jsonl.

Every benchmark that the folder holds, too, is read, and a record goes whose conversation shares a
run of 8 words with the prompt of a benchmark's record, or is one of its shorter prompts. The counts
are printed and kept in about.json.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from grm_jax import files
from grm_jax.benchmarks import BENCHMARKS
from grm_jax.benchmarks.sources import locate
from grm_jax.critique.prompt import Turn
from grm_jax.data.holdout import overlap, split
from grm_jax.data.preferences import Preference, read_preferences, write_preferences
from grm_jax.data.rows import iterate_rows
from grm_jax.errors import UserError

Name = Literal["harmless", "helpful", "arena", "helpsteer"]
SOURCES: dict[Name, str] = {
    "harmless": "hh_rlhf/harmless-base/test.jsonl.gz",
    "helpful": "hh_rlhf/helpful*.jsonl",
    "arena": "arena55k_sample/*.jsonl",
    "helpsteer": "helpsteer1_sample/*.jsonl",
}
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
RUN = 8  # words in a row that two texts share only if one was copied from the other
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Arguments:
    data: Path
    """The folder that holds the files."""
    output: Path
    """The folder to write to."""
    sources: tuple[Name, ...] = tuple(SOURCES)
    """Which files to read."""
    heldout: float = 0.2
    """The share of prompts that are held out."""


def main(args: Arguments) -> None:
    data = files.expanded(args.data)
    records, counts = read(data, args.sources)
    records, seen = without_benchmarks(records, data)
    counts |= seen
    learned, heldout = split(records, args.heldout)
    if shared := overlap(heldout, learned):
        raise UserError(f"{shared[0][0].source}: held out and learnt from: {shared[0][1]}")
    by_source = {
        name: [sum(record.domain == name for record in part) for part in (learned, heldout)]
        for name in args.sources
    }
    output = files.expanded(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_preferences(output / "train.jsonl", learned)
    write_preferences(output / "heldout.jsonl", heldout)
    with (output / "attributes.jsonl").open("w", encoding="utf-8") as file:
        for row in attributes(data, records) if "helpsteer" in args.sources else ():
            file.write(json.dumps(row) + "\n")
    about = {
        "counts": counts,
        "records (train, held out)": by_source,
        "responses": dict(sorted(collections.Counter(len(r.responses) for r in records).items())),
        "sha256": {
            name: hashlib.sha256((output / name).read_bytes()).hexdigest()
            for name in ("train.jsonl", "heldout.jsonl")
        },
    }
    (output / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for what, count in counts.items():
        print(f"{count:6}  {what}")
    for name, (train, held) in by_source.items():
        print(f"{train:6}  records of {name} to learn from, {held} held out")
    print(f"{len(learned):6}  records to learn from, {len(heldout)} held out: {output}")


def read(data: Path, sources: Sequence[Name]) -> tuple[list[Preference], dict[str, int]]:
    """The records of the sources, and what was left out, by reason.

    Raises UserError for a source without a file, and DataError for a file that can not be read.
    """
    records, counts = [], {"rows left out: their labels tie, or one response only": 0, "doubles": 0}
    left_out, doubles = counts
    seen: set[str] = set()
    for name in sources:
        if not list(data.glob(SOURCES[name])):
            raise UserError(
                f"--data {data}: holds no {SOURCES[name]}; put it there, or give --sources without "
                f"{name}"
            )
        found = read_preferences(data / SOURCES[name], skip_bad_rows=True, unique_best=True)
        counts[left_out] += len(found.skipped)
        for record in found:
            content = json.dumps([record.turns, sorted(record.responses)])
            if content in seen:
                counts[doubles] += 1
                continue
            seen.add(content)
            records.append(dataclasses.replace(record, id=f"{name}-{record.id}", domain=name))
    return records, counts


def without_benchmarks(
    records: Sequence[Preference], data: Path
) -> tuple[list[Preference], dict[str, int]]:
    """The records that share no prompt with a benchmark, and the counts of the others."""
    found, own = {}, {path.partition("/")[0] for path in SOURCES.values()}
    for name, benchmark in BENCHMARKS.items():
        folder = locate(benchmark, data, None, strict=False)
        if folder is None or folder.name in own or name in ("preferences", "synthetic"):
            continue
        found[name] = list(benchmark.load(folder))
    short: dict[tuple[str, ...], str] = {}
    runs: dict[tuple[str, ...], str] = {}
    for name, its_records in found.items():
        for record in its_records:
            words = _words(record.turns)
            if len(words) < RUN:
                short.setdefault(words, name)
            for run in _runs(words):
                runs.setdefault(run, name)
    kept, counts = [], dict.fromkeys(found, 0)
    for record in records:
        words = _words(record.turns)
        name = short.get(words) or next((runs[run] for run in _runs(words) if run in runs), None)
        if name is None:
            kept.append(record)
        else:
            counts[name] += 1
    return kept, {f"records left out: a prompt of {name}": n for name, n in counts.items()}


def _words(turns: Iterable[Turn]) -> tuple[str, ...]:
    """The words of the user's turns, in small letters."""
    text = " ".join(turn["content"] for turn in turns if turn["role"] == "user")
    return tuple(_WORD.findall(text.lower()))


def _runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for start in range(len(words) - RUN + 1):
        yield words[start : start + RUN]


def attributes(data: Path, records: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    """HelpSteer's ratings of the responses of each record: {"id", "helpfulness": [..], ..}."""
    ratings: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(data.glob(SOURCES["helpsteer"])):
        for row in iterate_rows(path):
            content = row.load()
            ratings[content["prompt"], content["response"]] = content
    for record in records:
        if record.domain != "helpsteer":
            continue
        rows = [ratings[record.query, response] for response in record.responses]
        yield {"id": record.id} | {name: [row[name] for row in rows] for name in ATTRIBUTES}


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
