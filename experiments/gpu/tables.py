"""Markdown of what the parts found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def part_table(result: Result) -> str:
    """One part: its heading, its rows and notes, and what went wrong."""
    return f"# {result['title']}\n\n{_state([result])}\n{_body([result])}"


def day_table(results: Sequence[Result]) -> str:
    """All parts: how each ended, then the tables. Parts with the same title share a table."""
    lines = ["# A day with a GPU", ""]
    if any(result["run"].get("dry") for result in results):
        lines += ["A dry run on a CPU, at toy size: its figures mean nothing.", ""]
    lines += [_state(results)]
    for title in dict.fromkeys(result["title"] for result in results):
        some = [result for result in results if result["title"] == title and "rows" in result]
        if some:
            lines += [f"## {title}", "", _body(some)]
    return "\n".join(lines)


def _state(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        run = result["run"]
        row = {"part": result["part"], "ended": run["state"], "seconds": run.get("seconds")}
        row["at most"] = run.get("limit_seconds")
        row["why"] = run.get("why")
        rows.append(row)
    return table(rows)


def _body(results: Sequence[Result]) -> str:
    blocks = []
    abouts = [result.get("about", {}) for result in results]
    # What differs between the parts of a table is left to their files.
    same = {
        name: value
        for name, value in abouts[0].items()
        if all(about.get(name) == value for about in abouts)
    }
    if same:
        blocks.append(", ".join(f"{name} {value}" for name, value in same.items()))
    rows = [row for result in results for row in result.get("rows", [])]
    if rows:
        blocks.append(table(rows).rstrip("\n"))
    notes = [note for result in results for note in result.get("notes", [])]
    if notes:
        blocks.append("\n".join(f"- {note}" for note in notes))
    blocks += [result["text"].rstrip("\n") for result in results if "text" in result]
    return "\n\n".join(blocks) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table whose columns are the keys of the rows, in the order in which they first come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    numeric = {
        name
        for name in names
        if all(isinstance(row.get(name), int | float | None) for row in rows)
        and not any(isinstance(row.get(name), bool) for row in rows)
    }
    lines = [_line(names), _line(["---:" if name in numeric else ":---" for name in names])]
    lines += [_line([_cell(row.get(name)) for name in names]) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", "<br>")
