"""The fault table: faults.json and faults.md beside this file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def commit() -> str:
    """The commit that is checked out; with a + when grm_jax is not as in it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/grm_jax")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def add(new: dict[str, Any]) -> None:
    """Add a row to the table, or replace it."""
    file = HERE / "faults.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    keys = [(row["fault"], row["stage"]) for row in rows]
    key = (new["fault"], new["stage"])
    if key in keys:
        rows[keys.index(key)] = new
    else:
        rows.append(new)
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = ["| fault | stage | what happened | commit |", "| :--- | :--- | :--- | :--- |"]
    for row in rows:
        mark = "" if row["good"] else "**not as it should be:** "
        cells = (row["fault"], row["stage"], mark + row["outcome"], row.get("commit", "before"))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    (HERE / "faults.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
