"""Result files in the format of a benchmark's leaderboard.

RewardBench's results repository (allenai/reward-bench-results on the Hugging Face hub) has two JSON
files for each model: `eval-set/MODEL.json` with the accuracy of every subset, and
`eval-set-scores/MODEL.json` with columns for every row: text_chosen, text_rejected, results,
scores_chosen, scores_rejected, subset, id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grm_jax.data.preferences import Preference
from grm_jax.scoring.aggregate import Method
from grm_jax.scoring.items import group_by
from grm_jax.scoring.rules import Rules

MODEL_TYPE = "Generative RM"


def write_rewardbench(
    directory: Path, model: str, records: Sequence[Preference], method: Method, rules: Rules
) -> list[Path]:
    """The two files of one method below `directory`, named after the model.

    Results are expected credits (a tie of two is 0.5); scores are means over the method's samples,
    null if no critique was parsable. Rows that the rules do not count have no result.
    """
    credits = method.credits(records, rules)
    means = []
    for scores in method.votes.scores():  # [S, 2]
        seen = ~np.isnan(scores[:, 0])
        means.append(scores[seen].mean(axis=0).tolist() if seen.any() else [None, None])
    subsets = group_by(records, lambda record: record.domain)
    name = model.strip("/").replace("/", "_").lstrip(".") or "model"
    about = {"model": model, "model_type": MODEL_TYPE, "chat_template": None}
    grouped: dict[str, Any] = dict(about)
    for subset in sorted(subsets):
        earned = np.asarray([credits[records[i].id] for i in subsets[subset].tolist()])
        if not np.isnan(earned).all():
            grouped[subset] = float(np.nanmean(earned))
    ids = [record.id for record in records]
    columns: dict[str, Any] = {
        "text_chosen": [_messages(record, record.best) for record in records],
        "text_rejected": [_messages(record, 1 - record.best) for record in records],
        "results": [None if np.isnan(c) else c for c in (credits[name] for name in ids)],
        "subset": [record.domain for record in records],
        "id": [_number(record.id) for record in records],
        "scores_chosen": [m[r.best] for m, r in zip(means, records, strict=True)],
        "scores_rejected": [m[1 - r.best] for m, r in zip(means, records, strict=True)],
        **about,
    }
    files = []
    for folder, value in (("eval-set", grouped), ("eval-set-scores", columns)):
        file = directory / folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
        files.append(file)
    return files


def _messages(record: Preference, place: int) -> list[dict[str, str]]:
    said = [{"role": turn["role"], "content": turn["content"]} for turn in record.turns]
    return [*said, {"role": "assistant", "content": record.responses[place]}]


def _number(id: str) -> int | str:
    """The row's id as the data set has it: "subset/12" is 12."""
    name = id.rpartition("/")[2]
    return int(name) if name.isdecimal() else name
