"""What every claim has: a name, the runs that it needs, and what it finds in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from roads import Road


@dataclasses.dataclass(frozen=True)
class Found:
    """What a claim's runs say.

    Attributes:
      text: Markdown: tables, and what is seen in them.
      figures: the numbers, as JSON.
      picture: a figure, if there is one.
    """

    text: str
    figures: dict[str, Any]
    picture: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim, in a module of the same name.

    Attributes:
      question: what is asked, in one sentence.
      runs: trains and judges what one seed needs; whatever is there is not done again.
      read: from all seeds to figures.
      quick: whether `run.py --quick` has it.
    """

    name: str
    question: str
    runs: Callable[[Road], None]
    read: Callable[[Sequence[Road]], Found]
    quick: bool = False


def line_picture(*, x: str, y: str) -> tuple[Figure, Axes]:
    """A picture for lines, with the names of its two axes."""
    picture = Figure(figsize=(6, 4))
    axes = picture.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return picture, axes


def write(claim: Claim, found: Found, about: dict[str, Any], folder: Path) -> None:
    """NAME.json, NAME.md and NAME.png in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **found.figures}, indent=1)
    (folder / f"{claim.name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{claim.name}.md").write_text(
        f"{claim.question}\n\n{found.text.strip()}\n", encoding="utf-8"
    )
    if found.picture is not None:
        found.picture.savefig(folder / f"{claim.name}.png", dpi=120, bbox_inches="tight")
