"""The language of a generative reward model: prompts, parsing, rewards and votes. Without JAX."""

from __future__ import annotations

from grm_jax.critique.adaptive import beyond_reach, change_probability, decided
from grm_jax.critique.correctness import (
    best_label,
    decisive,
    is_correct,
    keep_hinted,
    keep_rft,
    rule_reward,
    too_easy,
)
from grm_jax.critique.neutralise import neutralise
from grm_jax.critique.parse import Failure, Parsed, parse, parse_index, read, verdict_start
from grm_jax.critique.prompt import Message, Turn, render
from grm_jax.critique.template import BUILTIN, Template, TemplateError, hint_text
from grm_jax.critique.voting import (
    Vote,
    credit,
    majority,
    mean_scores,
    orders,
    shuffle,
    unshuffle,
    vote,
    weighted_vote,
)

__all__ = [
    "BUILTIN",
    "Failure",
    "Message",
    "Parsed",
    "Template",
    "TemplateError",
    "Turn",
    "Vote",
    "best_label",
    "beyond_reach",
    "change_probability",
    "credit",
    "decided",
    "decisive",
    "hint_text",
    "is_correct",
    "keep_hinted",
    "keep_rft",
    "majority",
    "mean_scores",
    "neutralise",
    "orders",
    "parse",
    "parse_index",
    "read",
    "render",
    "rule_reward",
    "shuffle",
    "too_easy",
    "unshuffle",
    "verdict_start",
    "vote",
    "weighted_vote",
]
