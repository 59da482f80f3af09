"""What a stage was made from, and whether a directory was begun with the same.

`config.json` of a stage holds the recipe as used and, under `content`, checksums of everything that
was read: data files, templates, tokenizer, the models that the stage starts from or samples. Paths
are not compared: the same files elsewhere are the same run, other files at the same path are not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grm_jax.identity import differences, hows, within
from grm_jax.training.setup import Setup, to_json

# Named by content, so not compared as paths.
PATHS = frozenset(
    ("setup.base", "setup.tokenizer", "setup.templates", "setup.preferences", "setup.instructions",
     "init")
)  # fmt: skip


def used(setup: Setup, stage: Any, init: str | None, content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a stage and checksums of what it reads, as `config.json` holds them.

    Args:
      content: `data`, a sorted list; `templates`, by field; `tokenizer`; `models`, a list in the
        order in which the stage names them, None for one that is not there, and `sources`, their
        names.
    """
    return json.loads(to_json({"setup": setup, "stage": stage, "init": init, "content": content}))


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: Any
) -> tuple[list[str], list[str]]:
    """(what differs and must not, what differs and may), a line each.

    Args:
      before: a `config.json`; also of earlier versions, which had checksums of the data alone and
        left some fields out.
      stage: the stage's part of the recipe.
    """
    free = hows(Setup(), "setup.")
    usual: dict[str, Any] = {"setup": Setup()}
    if dataclasses.is_dataclass(stage) and not isinstance(stage, type):
        free |= hows(stage, "stage.")
        usual["stage"] = type(stage)()
    must, may = [], []
    old = {name: value for name, value in before.items() if name != "data"}
    content = before.get("content")
    if not isinstance(content, dict):  # an earlier version's
        content = {"data": sorted(before.get("data", {}).values())}
    old["content"] = {**now["content"], **content}
    held = _names(before)
    for name, (was, here) in differences(old, now, json.loads(to_json(usual))).items():
        if within(name, free):
            if name in held:
                may.append(f"{name}: {was!r} -> {here!r}")
        elif name == "content.models":
            must += _other_models(was, here, now["content"]["sources"])
        elif name == "content.data":
            must.append(f"the data files: {was} -> {here}")
        elif name != "content.sources" and not ("content" in before and within(name, PATHS)):
            must.append(f"{name}: {was!r} -> {here!r}")
    return must, may


def _other_models(
    was: Sequence[str | None], here: Sequence[str | None], sources: Sequence[str]
) -> list[str]:
    """A line for each model that is not the one that the stage was made from."""
    if len(was) != len(here):
        return [f"the number of models it is made from: {len(was)} -> {len(here)}"]
    return [
        f"the model it was made from, {source}, is another one now"
        for source, old, new in zip(sources, was, here, strict=True)
        # The model of a stage that is gone can not be compared, and what stands needs it no longer.
        if old != new and (new is not None or source == "base")
    ]


def _names(tree: Any, prefix: str = "") -> set[str]:
    """Dotted names of all leaves."""
    if not isinstance(tree, dict):
        return {prefix[:-1]}
    return {name for key, value in tree.items() for name in _names(value, f"{prefix}{key}.")}


def begun(directory: Path) -> bool:
    """Whether a stage's directory holds anything that another recipe could spoil: samples, a
    checkpoint, a model. A recipe and logs alone are none of these.
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
