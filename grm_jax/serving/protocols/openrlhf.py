"""OpenRLHF's remote reward model: `--reward.remote_url http://host:port/get_reward?group_size=8`.

    {"query": [prompt + response], "prompts": [..], "labels": [..]}
      -> {"rewards": [7.5], "scores": [0.72], "extra_logs": {"grm_rank": [1.0], ..}}

`query` is what the policy read and wrote, with its special tokens. `rewards` go into advantages;
`scores`, in 0..1, into dynamic filtering; `extra_logs` must be numbers. OpenRLHF sends one sample a
request, gives up after 180 s and tries five times; a reward that never comes ends its training. So
every failure is a 503 before that, and never a number.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from grm_jax.data.rows import DataError
from grm_jax.serving.groups import Groups
from grm_jax.serving.protocols.common import (
    Body,
    BusyRoute,
    RolloutOptions,
    api_router,
    scale,
    together,
    unit,
)
from grm_jax.serving.protocols.policy_text import read_prompt, read_response, split
from grm_jax.serving.service import Service

SECONDS = 170.0  # before OpenRLHF's 180


class GetRewardRequest(Body):
    query: list[str] = Field(min_length=1)
    """Prompt and response, as the policy's tokenizer writes its tokens."""
    prompts: list[str]
    """The prompts alone, in the same markup."""
    labels: list[Any] | None = None


class GetRewardReply(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("OpenRLHF", BusyRoute)

    @routes.post("/get_reward")
    async def get_reward(
        body: GetRewardRequest, options: RolloutOptions = Query()
    ) -> GetRewardReply:
        """Rewards of samples that OpenRLHF sends, each judged in its prompt's group."""
        labels = [None] * len(body.query) if body.labels is None else body.labels
        if not len(body.query) == len(body.prompts) == len(labels):
            raise DataError("query", "of another length than prompts or labels", "send one of each")
        asked = []
        for query, prompt, label in zip(body.query, body.prompts, labels, strict=True):
            turns, begun = read_prompt(prompt)
            response = read_response(begun + split(query, prompt))
            asked.append(options.request(service, turns, response, label))
        shares = await together(
            groups.score(request, seconds=SECONDS, size=options.group_size, window=options.window)
            for request in asked
        )
        rated = scale(service, shares[0].verdict, asked[0].options)
        return GetRewardReply(
            rewards=[options.value(share) for share in shares],
            scores=[unit(share.score, rated) for share in shares],
            extra_logs={
                "grm_score": [share.score for share in shares],
                "grm_rank": [share.rank for share in shares],
                "grm_std": [share.std for share in shares],
                "grm_group_size": [float(share.size) for share in shares],
            },
        )

    return routes
