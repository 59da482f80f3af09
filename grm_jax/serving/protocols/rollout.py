"""Native: one rollout a request, judged in its group. verl's adapter and others speak it.

POST /v1/rollout {"query": .., "response": .., "group_size": 8, "k": 4}
  -> {"score": 7.5, "rank": 1.0, "unit": 0.72, "std": .., "group_size": 8, "verdict": {..}}
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from grm_jax.data.rows import DataError
from grm_jax.judge.request import OPTIONS, JudgeRequest
from grm_jax.serving.groups import Groups
from grm_jax.serving.protocols.common import Body, Whole, api_router, scale, score_options, unit
from grm_jax.serving.service import Service


class RolloutRequest(Body):
    """A prompt with one response, and how its group is judged."""

    model_config = ConfigDict(extra="allow")  # the options of `ScoreOptions`

    query: str | list[dict[str, Any]]
    """A text, or chat messages of which the last is the user's."""
    response: str | list[dict[str, Any]]
    """A text, or messages, which are joined."""
    reference: str | None = None
    principles: list[str] | None = None
    criteria: str | list[str] | None = None
    group_size: Whole | None = Field(None, ge=1, le=1024)
    window: float | None = Field(None, ge=0, le=100)
    scope: str = Field("", max_length=200)
    """Sets apart equal prompts that do not belong together, by a task's id."""
    timeout: float = Field(170.0, gt=0, le=3600)
    """Seconds until the rollout is given up."""


class RolloutReply(BaseModel):
    """A rollout's share of its group's verdict."""

    score: float
    """Mean score over the critiques, on the template's scale."""
    unit: float
    """The same within 0..1."""
    rank: float
    """Rank in the group, 0 the worst and 1 the best."""
    std: float
    """Standard deviation of the score over the critiques."""
    group_size: int
    """Rollouts that were judged together."""
    index: int
    """The rollout's place in the verdict."""
    verdict: dict[str, Any]
    """Of the whole group, without the texts of the critiques."""


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("native")

    @routes.post("/v1/rollout")
    async def rollout(body: RolloutRequest) -> RolloutReply:
        """Judge one rollout together with the others of its prompt that arrive in time."""
        options = dict(body.model_extra or {})
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise DataError(unknown[0], "unknown field", f"the options are {', '.join(OPTIONS)}")
        request = JudgeRequest.make(
            body.query,
            [body.response],
            reference=body.reference,
            principles=body.principles,
            criteria=body.criteria,
            options=score_options(service, **options),
        )
        share = await groups.score(
            request,
            seconds=body.timeout,
            scope=body.scope,
            size=body.group_size,
            window=body.window,
        )
        return RolloutReply(
            score=share.score,
            unit=unit(share.score, scale(service, share.verdict, request.options)),
            rank=share.rank,
            std=share.std,
            group_size=share.size,
            index=share.index,
            verdict=share.verdict.to_json(critiques=False),
        )

    return routes
