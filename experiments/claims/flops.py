"""What training and judging cost, in FLOPs: six a parameter and trained token, two a read one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from evidence import Judged

from grm_jax.model.params import count_params, param_table
from grm_jax.model.storage import read_model_config


def parameters(stage: Path) -> int:
    """Those that take part in a token: all of them, since the embedding is the output head, too."""
    return count_params(param_table(read_model_config(stage / "model")))


def training(stage: Path) -> float:
    """FLOPs of a stage's gradient steps: 6 N a token. Sampling is not in them.

    The tokens of its steps are read from its log: tokens a second times the time since the row
    before.
    """
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train_tokens_per_second" in row]
    pairs = list(itertools.pairwise(rows))
    tokens = sum(b["train_tokens_per_second"] * (b["time"] - a["time"]) for a, b in pairs)
    counted = rows[-1]["step"] - rows[0]["step"]
    return 6.0 * parameters(stage) * tokens / counted * rows[-1]["step"]


def judging(stage: Path, judged: Judged, prompt: float, critique: float, k: int) -> float:
    """FLOPs of k critiques of each record: 2 N a token; a prompt is read once in each order.

    Args:
      prompt, critique: their mean numbers of tokens.
    """
    tokens = sum(
        len(group.records) * (min(k, group.scalar.shape[1]) * prompt + k * critique)
        for group in judged
    )
    return 2.0 * parameters(stage) * tokens
