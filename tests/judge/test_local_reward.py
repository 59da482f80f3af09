"""A judge in the trainer's process, in place of a server."""

from __future__ import annotations

import asyncio

import pytest

from grm_jax.errors import UserError
from grm_jax.judge.judge import Judge
from grm_jax.serving.adapters.trl import trl_reward, trl_reward_async


def test_trls_reward_with_a_judge(folder):
    judge = Judge.load(folder)
    asked = {"prompts": ["p", "q", "p"], "completions": ["a", "b", "c"]}
    # Random weights write nothing that can be read: None, not a number.
    assert trl_reward(judge, k=2)(**asked) == [None] * 3
    assert asyncio.run(trl_reward_async(judge, k=2)(**asked)) == [None] * 3
    with pytest.raises(UserError, match="needs a meta RM"):
        trl_reward(judge, method="guided")(**asked)
