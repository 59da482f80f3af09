"""Verdicts as a page that opens from disk: queries, responses with scores, and the critiques."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from grm_jax.data.fields import Fields
from grm_jax.data.shapes import read_texts
from grm_jax.errors import UserError
from grm_jax.files import written_whole

SHOWN = 500  # verdicts of a page

Shown = tuple[str, Sequence[str], dict[str, Any]]  # query, responses, verdict as JSON


def write_page(path: Path, rows: Sequence[Shown], *, title: str, left: int = 0) -> None:
    """Write the page; `left`: how many verdicts are not on it."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (resources.files("grm_jax.judge") / "verdicts.html").read_text(encoding="utf-8")
    scores = [score for _, _, verdict in rows for score in verdict.get("scores") or ()]
    text = environment.from_string(source).render(
        title=title, rows=rows, left=left, top=10.0 if max(scores, default=1.0) > 1 else 1.0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_file_page(path: Path, scored: Path, *, title: str) -> None:
    """The page of a file that `score_file` wrote, its first `SHOWN` rows."""
    rows: list[Shown] = []
    total = 0
    with scored.open(encoding="utf-8") as file:
        for line in file:
            total += 1
            if len(rows) < SHOWN:
                row = json.loads(line)
                rows.append((*_texts(row), row["verdict"]))
    write_page(path, rows, title=title, left=total - len(rows))


def _texts(row: dict[str, Any]) -> tuple[str, Sequence[str]]:
    try:
        turns, responses = read_texts(Fields(row))
    except UserError:  # a bad row, whose verdict says what is wrong
        return json.dumps({k: v for k, v in row.items() if k != "verdict"}, ensure_ascii=False), ()
    if len(turns) == 1:
        return turns[0]["content"], responses
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns), responses
