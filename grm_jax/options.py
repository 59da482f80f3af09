"""The ranges of all numeric options of the recipes, checked before anything starts.

One table has the range of each numeric field of every recipe; a test goes through all recipes and
fails on a field without a range.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from grm_jax.errors import UserError

INF = math.inf
# Dataclass -> field -> (smallest, largest) value.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "Setup": {
        "seed": (0, 2**32 - 1),
        "max_bad_share": (0, 1),
        "length_buckets": (1, INF),
        "prompt_buckets": (1, INF),
        "logprob_chunk": (1, INF),
        "log_every": (1, INF),
        "checkpoint_every": (1, INF),
    },
    "WorldConfig": {
        "seed": (0, 2**32 - 1),
        "cold_start": (1, INF),
        "train": (1, INF),
        "fresh": (1, INF),
        "shifted": (1, INF),
    },
    "JudgeDefaults": {"temperature": (1e-6, INF), "max_new_tokens": (1, INF)},
    "MeshConfig": {
        "replica": (-1, INF),
        "fsdp": (-1, INF),
        "tensor": (-1, INF),
        "sequence": (-1, INF),
        "cpu_devices": (1, INF),
    },
    "EngineConfig": {
        "max_rows": (1, INF),
        "page": (1, INF),
        "prefill_tokens": (1, INF),
        "chunk": (1, INF),
        "min_lanes": (1, INF),
        "spare": (0, INF),
        "cache_bytes": (1, INF),
    },
    "LoRAConfig": {"rank": (0, INF), "alpha": (1e-12, INF)},
    "GuardConfig": {"spike": (0, INF), "patience": (1, INF), "rollbacks": (0, INF)},
    "KeepConfig": {"latest": (1, INF), "every": (0, INF)},
    "HeldOutConfig": {"every": (0, INF), "share": (0, 0.99), "limit": (1, INF)},
    "Fitting": {
        "steps": (1, INF),
        "batch_size": (1, INF),
        "pack": (0, INF),
        "device_batch": (0, INF),
    },
    "OptimizerConfig": {
        "learning_rate": (0, INF),
        "adam_scale": (0, INF),
        "warmup_steps": (0, INF),
        "final_fraction": (0, 1),
        "b1": (0, 1),
        "b2": (0, 1),
        "weight_decay": (0, INF),
        "clip_norm": (0, INF),
    },
    "SamplingConfig": {
        "temperature": (0, INF),
        "top_k": (0, INF),
        "top_p": (1e-9, 1),
        "min_p": (0, 1),
        "max_new_tokens": (1, INF),
    },
    "ColdStart": {"records": (1, INF), "samples": (1, INF), "chunk": (1, INF)},
    "RFT": {
        "records": (1, INF),
        "samples": (1, INF),
        "orders": (1, INF),
        "chunk": (1, INF),
        "text_weight": (0, INF),
    },
    "RL": {
        "steps": (1, INF),
        "prompts": (1, INF),
        "orders": (1, INF),
        "group": (2, INF),  # a group of one has no advantage
        "kl_coef": (0, INF),
        "clip_low": (0, 1),
        "clip_high": (0, INF),
        "rare": (0, 1),
        "vote": (0, INF),
        "text_weight": (0, INF),
        "train_groups": (1, INF),
        "device_batch": (0, INF),
    },
    "MetaRM": {"records": (1, INF), "samples": (0, INF), "holdout": (0, 0.99)},
    "Evaluation": {"k": (1, INF), "records": (1, INF)},
}
ASCENDING = ("length_buckets", "prompt_buckets")


def check(recipe: Any) -> None:
    """Raise UserError for the first option whose value is out of range, named as it is typed."""
    for option, owner, name, value in numbers(recipe):
        low, high = RANGES[owner][name]
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            raise UserError(f"{option}: give at least one number")
        if name in ASCENDING and any(a >= b for a, b in itertools.pairwise(values)):
            raise UserError(f"{option} {_shown(values)}: give them in ascending order")
        if not all(low <= one <= high for one in values):  # false for NaN
            wanted = f"{low:g} or more" if high == INF else f"{low:g} to {high:g}"
            raise UserError(f"{option} {_shown(values)}: give {wanted}")
        if owner == "MeshConfig" and 0 in values:
            raise UserError(f"{option} 0: give the number of devices, or -1 for what is left")


def numbers(recipe: Any, prefix: str = "--") -> Iterator[tuple[str, str, str, Any]]:
    """(option as it is typed, dataclass, field, value) for each numeric field that has a value."""
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        option = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            # The fields of `setup` are options without a prefix.
            yield from numbers(value, prefix if field.name == "setup" else f"{option}.")
        elif type(value) in (int, float) or (isinstance(value, tuple) and field.name in ASCENDING):
            yield option, type(recipe).__name__, field.name, value


def _shown(values: tuple[Any, ...]) -> str:
    return " ".join(map(str, values))
