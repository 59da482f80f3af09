"""slime's remote reward model: `--rm-type remote_rm --rm-url http://host:port/rm?group_size=8`.

    {"prompt": text or messages, "response": text, "label": any} -> a number

With `?detail=true` the reply is an object, for `--reward-key score`. slime gives up after 120 s
and tries ten times, also after a 4xx; a failure is a 503 before that, and never a number.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from grm_jax.serving.groups import Groups
from grm_jax.serving.protocols.common import Body, BusyRoute, RolloutOptions, api_router
from grm_jax.serving.protocols.policy_text import read_prompt, read_response
from grm_jax.serving.service import Service

SECONDS = 110.0  # before slime's 120


class RmRequest(Body):
    prompt: str | list[dict[str, Any]]
    """With the policy's chat tokens, or messages."""
    response: str
    label: Any = None


class RmOptions(RolloutOptions):
    detail: bool = False
    """An object of numbers, not the reward alone."""


class RmDetail(BaseModel):
    score: float
    rank: float
    std: float
    group_size: int


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("slime", BusyRoute)

    @routes.post("/rm")
    async def rm(body: RmRequest, options: RmOptions = Query()) -> float | RmDetail:
        """The reward of one sample, judged in its prompt's group."""
        response = read_response(body.response)
        query: Any = body.prompt
        if isinstance(body.prompt, str):
            query, begun = read_prompt(body.prompt)
            response = read_response(begun + body.response)
        share = await groups.score(
            options.request(service, query, response, body.label),
            seconds=SECONDS,
            size=options.group_size,
            window=options.window,
        )
        if options.detail:
            return RmDetail(
                score=share.score, rank=share.rank, std=share.std, group_size=share.size
            )
        return options.value(share)

    return routes
