"""What a stage was made from, and whether it is resumed with the same.

`config.json` of a stage holds the recipe as used and, under `content`, checksums of everything that
was read: data files, templates, tokenizer, the models that the stage starts from or samples. Paths
are not compared: the same files elsewhere make the same run, other files at the same path do not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax.identity import differences, hows, within
from grm_jax.training.setup import Setup, to_json

# Compared by their content, not as paths.
PATHS = frozenset(
    ("setup.base", "setup.tokenizer", "setup.templates", "setup.preferences", "setup.instructions",
     "init")
)  # fmt: skip


def used(setup: Setup, stage: Any, init: str | None, content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a stage and checksums of what it reads, as `config.json` holds them.

    Args:
      content: checksums: `data`, a sorted list; `templates`, by field; `tokenizer`; `models`, a
        list in the order in which the stage names them, with None for a missing one; `sources`,
        the names of the models; and `examples`, by field, of a stage that reads further templates.
    """
    return json.loads(to_json({"setup": setup, "stage": stage, "init": init, "content": content}))


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: Any
) -> tuple[list[str], list[str]]:
    """(differences that are refused, differences that are allowed), one line each.

    Args:
      before: the `config.json` of the stage, perhaps of an earlier version, which had checksums of
        the data alone and left some fields out.
      now: the present value of `used`.
      stage: the dataclass of the stage's options.
    """
    changeable = hows(Setup(), "setup.")
    defaults: dict[str, Any] = {"setup": Setup()}
    if dataclasses.is_dataclass(stage) and not isinstance(stage, type):
        changeable |= hows(stage, "stage.")
        defaults["stage"] = type(stage)()
    refused, allowed = [], []
    old = {name: value for name, value in before.items() if name != "data"}
    content = before.get("content")
    if not isinstance(content, dict):  # an earlier version's
        content = {"data": sorted(before.get("data", {}).values())}
    old["content"] = {**now["content"], **content}
    recorded = _names(before)
    for name, (was, value) in differences(old, now, json.loads(to_json(defaults))).items():
        if within(name, changeable):
            if name in recorded:
                allowed.append(f"{name}: {was!r} -> {value!r}")
        elif name == "content.models":
            refused += _other_models(was, value, now["content"]["sources"])
        elif name == "content.data":
            refused.append(f"the data files: {was} -> {value}")
        elif name != "content.sources" and not ("content" in before and within(name, PATHS)):
            refused.append(f"{name}: {was!r} -> {value!r}")
    return refused, allowed


def _other_models(
    before: Sequence[str | None], now: Sequence[str | None], sources: Sequence[str]
) -> list[str]:
    """A line for each model that is not the one that the stage was made from."""
    if len(before) != len(now):
        return [f"the number of models it is made from: {len(before)} -> {len(now)}"]
    return [
        f"the model it was made from, {source}, is another one now"
        for source, old, new in zip(sources, before, now, strict=True)
        # A deleted model of a stage can not be compared, and a stage that has begun does not read
        # it again.
        if old != new and (new is not None or source == "base")
    ]


def _names(tree: Any, prefix: str = "") -> set[str]:
    """The dotted names of all leaves of a tree of dicts."""
    if not isinstance(tree, dict):
        return {prefix[:-1]}
    return {name for key, value in tree.items() for name in _names(value, f"{prefix}{key}.")}


def begun(directory: Path) -> bool:
    """Whether a stage's directory holds results that another recipe could spoil: samples, a
    checkpoint, a model. A recipe and logs alone do not count.
    """
    if not directory.is_dir():
        return False
    for path in directory.iterdir():
        if path.name in ("config.json", "metrics.jsonl") or "tfevents" in path.name:
            continue
        if path.is_dir() and not any(path.iterdir()):
            continue
        if path.is_file() and path.stat().st_size == 0:
            continue
        return True
    return False
