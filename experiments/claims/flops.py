"""What training and judging cost, in FLOPs: six a parameter and trained token, two a read one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

from evidence import Judged

from grm_jax.model.params import count_params, param_table
from grm_jax.model.storage import read_model_config


def parameters(stage: Path) -> int:
    """Those that take part in a token: all of them, since the embedding is the output head, too."""
    return count_params(param_table(read_model_config(stage / "model")))


@dataclasses.dataclass(frozen=True)
class Updates:
    """The gradient steps of a stage, as its log tells them.

    Attributes:
      steps: how many there were.
      tokens: of one step.
      seconds: of one step, with all that it waited for.
    """

    steps: int
    tokens: float
    seconds: float


def updates(stage: Path) -> Updates:
    """What a stage's log says of its gradient steps.

    The tokens of a step are tokens a second times the time since the row before. Medians of all
    rows are taken, since the time between two rows is longer where the stage was stopped and went
    on later.
    """
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train_tokens_per_second" in row]
    pairs = list(itertools.pairwise(rows))
    seconds = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs]
    tokens = [
        after["train_tokens_per_second"] * each
        for (_, after), each in zip(pairs, seconds, strict=True)
    ]
    return Updates(rows[-1]["step"], statistics.median(tokens), statistics.median(seconds))


def training(stage: Path) -> float:
    """FLOPs of a stage's gradient steps: 6 N a token. Sampling is not in them."""
    found = updates(stage)
    return 6.0 * parameters(stage) * found.tokens * found.steps


def judging(stage: Path, judged: Judged, prompt: float, critique: float, k: int) -> float:
    """FLOPs of k critiques of each record: 2 N a token; a prompt is read once in each order.

    Args:
      prompt, critique: their mean numbers of tokens.
    """
    tokens = sum(
        len(group.records) * (min(k, group.scalar.shape[1]) * prompt + k * critique)
        for group in judged
    )
    return reading(stage, tokens)


def reading(stage: Path, tokens: float) -> float:
    """FLOPs of tokens that are read or written: 2 N each."""
    return 2.0 * parameters(stage) * tokens
