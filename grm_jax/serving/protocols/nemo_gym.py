"""NeMo Gym: the judge as a resources server, and as the model that its own one asks.

    POST /verify         a rollout, judged with the others of its task -> the row + its reward
    POST /compare        n responses at once -> rewards, and pairs as a pairwise judge has them
    POST /v1/responses   a pair in `metadata` -> {"score_1": .., "score_2": .., "ranking": ..}
    POST /seed_session, /aggregate_metrics, GET /reverify_mode: what every resources server has

Scores are on NeMo Gym's scale: 1 to 5 for a response, 1 (the first is much better) to 6 for a pair,
3.5 for a tie. A failed judgement is NeMo's own failure: /verify answers 200 with
`_ng_failure_class: "judge_failed"`, which its collector keeps out of every mean and asks again;
/v1/responses a response of status "failed"; /compare, which has no field for it, 503.

`default_score` (3.0) stands where NeMo Gym has it: /compare of fewer than two responses.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from grm_jax.data.rows import DataError
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Verdict
from grm_jax.serving.groups import Groups
from grm_jax.serving.problems import ServiceProblem
from grm_jax.serving.protocols.common import (
    Body,
    BusyRoute,
    Whole,
    api_router,
    new_id,
    now,
    readable,
    require_unset,
    scale,
    score_options,
    unit,
)
from grm_jax.serving.service import Service

DEFAULT_SCORE = 3.0
SECONDS = 600.0
_TASK = "_ng_task_index"
_EMPTY = "None"  # what NeMo Gym shows its judge for a response without text


class CompareRequest(Body):
    conversation_history: list[dict[str, Any]]
    response_objs: list[dict[str, Any]]
    """Objects of the Responses API."""
    principle: str | None = None


class ComparisonResult(BaseModel):
    response_i: int
    response_j: int
    judge_idx: int
    score_1: float
    score_2: float
    ranking: float


class CompareReply(BaseModel):
    rewards: list[float]
    comparison_results: list[ComparisonResult] | None = None
    metrics: dict[str, float] | None = None


class CreateParams(Body):
    """Of the rollout: what the policy was asked."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]


class VerifyRequest(Body):
    """One rollout. What is not named here comes back as it was sent."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    responses_create_params: CreateParams
    response: dict[str, Any]
    principle: str | None = None
    task_index: Whole | None = Field(None, alias=_TASK)
    rollout_index: Whole | None = Field(None, alias="_ng_rollout_index")
    prompt_id: str | None = None


class VerifyReply(VerifyRequest):
    reward: float


class AggregateRequest(Body):
    verify_responses: list[dict[str, Any]]


class AggregateReply(BaseModel):
    group_level_metrics: list[dict[str, Any]] = []
    agent_metrics: dict[str, Any] = {}
    key_metrics: dict[str, Any] = {}


class PairRequest(Body):
    """Of the Responses API, as NeMo Gym's `genrm_compare` fills it in."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]
    metadata: dict[str, Any] | None = None
    model: str | None = None
    temperature: float | None = None
    max_output_tokens: Whole | None = None
    stream: bool | None = None


class VerifyRoute(APIRoute):
    """A failed judgement is a row of its own class. What is no rollout stays an error."""

    def get_route_handler(self):
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except _JudgeFailed as failed:
                return JSONResponse(failed.row)

        return handler


class _JudgeFailed(Exception):
    def __init__(self, row: dict[str, Any], error: ServiceProblem | UserError):
        kind = error.kind if isinstance(error, ServiceProblem) else "refused"
        self.row = row | {
            "reward": 0.0,
            "_ng_failure_class": "judge_failed",
            "_ng_failure_judge_error": f"{kind}: {error}",
        }


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("NeMo Gym", BusyRoute)
    verifying = api_router("NeMo Gym", VerifyRoute)

    @routes.post("/compare")
    async def compare(body: CompareRequest) -> CompareReply:
        """Rewards of n responses to one conversation, from one judgement of them all."""
        if len(body.response_objs) < 2:
            return CompareReply(rewards=[DEFAULT_SCORE])
        request = JudgeRequest.make(
            body.conversation_history,
            [_shown(response) for response in body.response_objs],
            criteria=body.principle,
            options=score_options(service),
        )
        verdict = readable(await service.judge(request))
        scores = _scores(service, request, verdict)
        pairs = [_pair(scores, i, (i + 1) % len(scores)) for i in range(len(scores))]
        seen = [score for pair in pairs for score in (pair.score_1, pair.score_2)]
        metrics = {
            "mean_individual_score": statistics.fmean(seen),
            "std_individual_score": statistics.pstdev(seen),
            "tiebreak_usage_rate": statistics.fmean(p.score_1 == p.score_2 for p in pairs),
        }
        return CompareReply(rewards=scores, comparison_results=pairs, metrics=metrics)

    @verifying.post("/verify", response_model_by_alias=True)
    async def verify(body: VerifyRequest) -> VerifyReply:
        """The rollout with its reward, judged with the others of its task that arrive in time."""
        request = JudgeRequest.make(
            body.responses_create_params.input,
            [_shown(body.response)],
            criteria=body.principle,
            options=score_options(service),
        )
        scope = f"task {body.task_index}" if body.task_index is not None else body.prompt_id or ""
        row = body.model_dump(by_alias=True, exclude_unset=True)
        try:
            share = await groups.score(request, seconds=SECONDS, scope=f"nemo {scope}")
        except (ServiceProblem, UserError) as error:  # a prompt that is too long, for example
            raise _JudgeFailed(row, error) from error
        rated = scale(service, share.verdict, request.options)
        return VerifyReply.model_validate(row | {"reward": _one_to_five(share.score, rated)})

    @routes.post("/seed_session")
    async def seed_session(body: dict[str, Any]) -> dict[str, Any]:
        """Nothing to prepare: a judge keeps no state of a rollout."""
        return {}

    @routes.get("/reverify_mode")
    async def reverify_mode() -> Literal["unsupported"]:
        """A rollout's reward depends on the group it was judged in."""
        return "unsupported"

    @routes.post("/aggregate_metrics")
    async def aggregate_metrics(body: AggregateRequest) -> AggregateReply:
        """Mean, maximum, minimum, median and deviation of each number of the rows."""
        rows = [row for row in body.verify_responses if "_ng_failure_class" not in row]
        tasks: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            tasks.setdefault(row.get(_TASK, 0), []).append(row)
        figures = _figures(rows)
        return AggregateReply(
            group_level_metrics=[
                {_TASK: task, **_figures(tasks[task])} for task in sorted(tasks, key=str)
            ],
            agent_metrics=figures,
            key_metrics={name: n for name, n in figures.items() if name.startswith("mean/")},
        )

    @routes.post("/v1/responses")
    async def responses(body: PairRequest) -> dict[str, Any]:
        """The judgement of the pair in `metadata`, as JSON in the text of a response."""
        pair = body.metadata or {}
        if not all(isinstance(pair.get(name), str) for name in ("response_1", "response_2")):
            raise DataError(
                "metadata",
                "no response_1 and response_2",
                "give both as texts; for plain generation use /v1/chat/completions",
            )
        require_unset(stream=bool(body.stream))
        request = JudgeRequest.make(
            body.input,
            [pair["response_1"], pair["response_2"]],
            criteria=pair.get("principle"),
            options=score_options(
                service, temperature=body.temperature, max_new_tokens=body.max_output_tokens
            ),
        )
        reply = {
            "id": new_id("resp"), "object": "response", "created_at": now(), "error": None,
            "model": service.served.model, "status": "completed", "output": [],
            "incomplete_details": None, "instructions": None, "metadata": pair,
            "parallel_tool_calls": False, "temperature": body.temperature, "tool_choice": "none",
            "tools": [], "top_p": None,
        }  # fmt: skip
        try:
            verdict = readable(await service.judge(request))
        except ServiceProblem as error:
            return reply | {
                "status": "failed",
                "error": {"code": "server_error", "message": f"{error.kind}: {error}"},
                "_ng_failure_class": "judge_failed",
            }
        judged = _pair(_scores(service, request, verdict), 0, 1)
        said = {"score_1": judged.score_1, "score_2": judged.score_2, "ranking": judged.ranking}
        usage = verdict.usage
        return reply | {
            "output": [
                {
                    "id": new_id("msg"), "type": "message", "role": "assistant",
                    "status": "completed",
                    "content": [
                        {"type": "output_text", "text": json.dumps(said), "annotations": []}
                    ],
                }
            ],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.sampled_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.sampled_tokens,
            },
        }  # fmt: skip

    routes.include_router(verifying)
    return routes


def _scores(service: Service, request: JudgeRequest, verdict: Verdict) -> list[float]:
    rated = scale(service, verdict, request.options)
    return [_one_to_five(score, rated) for score in verdict.scores]


def _one_to_five(score: float, rated: tuple[float, float]) -> float:
    return 1.0 + 4.0 * unit(score, rated)


def _pair(scores: Sequence[float], i: int, j: int) -> ComparisonResult:
    """Two of the scores as a comparison."""
    lead = scores[i] - scores[j]
    if lead:
        step = 0 if abs(lead) < 1 else 1 if abs(lead) < 2 else 2
        ranking = float(3 - step if lead > 0 else 4 + step)
    else:
        ranking = 3.5
    return ComparisonResult(
        response_i=i, response_j=j, judge_idx=0, score_1=scores[i], score_2=scores[j],
        ranking=ranking,
    )  # fmt: skip


def _shown(response: Mapping[str, Any]) -> str:
    """The text of a response's messages, without its reasoning, as NeMo Gym's judge reads it."""
    said = "".join(
        part["text"]
        for item in _dicts(response.get("output")) if item.get("type", "message") == "message"
        for part in _dicts(item.get("content")) if isinstance(part.get("text"), str)
    )  # fmt: skip
    return said if said.strip() else _EMPTY


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`mean/reward` and the like, of every number in the rows."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not name.startswith("_ng_"):
                columns.setdefault(name, []).append(float(value))
    return {
        f"{what}/{name}": figure
        for name, values in columns.items()
        for what, figure in (
            ("mean", statistics.fmean(values)),
            ("max", max(values)),
            ("min", min(values)),
            ("median", statistics.median(values)),
            ("std", statistics.stdev(values) if len(values) > 1 else 0.0),
        )
    }
