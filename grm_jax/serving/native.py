"""The native routes: /v1/judge, /health, /ready, /metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import Verdict
from grm_jax.serving.metrics import RequestMetrics
from grm_jax.serving.problems import EngineFailed, ServiceProblem, Unavailable
from grm_jax.serving.replies import error_of
from grm_jax.serving.schemas import (
    OF_THE_ROUTE,
    ErrorReply,
    HealthReply,
    JudgeBody,
    ReadyReply,
    VerdictReply,
)
from grm_jax.serving.service import Progress, Service

EVENTS = "text/event-stream"
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "What is asked can not be judged, or is no JSON."},
    401: {"model": ErrorReply, "description": "The server's token is missing or another one."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    415: {"model": ErrorReply, "description": "The body is not application/json."},
    422: {"model": ErrorReply, "description": "A field of another type, or one not known."},
    429: {"model": ErrorReply, "description": "Too much waits; see the header Retry-After."},
    500: {"model": ErrorReply, "description": "An error of the server."},
    503: {"model": ErrorReply, "description": "The model is being loaded, or the server stops."},
    504: {"model": ErrorReply, "description": "No verdict before the deadline."},
}

# One event, as the document has it; its data are JSON: `Progress`, a verdict, or an error.
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["progress", "verdict", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def router(service: Service, metrics: RequestMetrics) -> APIRouter:
    """The routes of a service."""
    routes = APIRouter()

    @routes.post(
        "/v1/judge",
        summary="Judge one query's responses",
        response_model=None,
        responses={
            200: {
                "model": VerdictReply,
                "description": (
                    "The verdict. With `stream`, or where text/event-stream is accepted: events "
                    "`progress`, then `verdict` or `error`."
                ),
                "content": {EVENTS: {"schema": _EVENT}},
            },
            **_ERRORS,
        },
    )
    async def judge(body: JudgeBody, request: Request) -> Response:
        values = body.model_dump(exclude_unset=True, exclude=set(OF_THE_ROUTE))
        asked = service.request(_without_nulls(values))
        if body.stream or EVENTS in request.headers.get("accept", ""):
            return await _stream(service, asked, body)
        verdict = await service.judge(asked, deadline=body.deadline)
        return JSONResponse(verdict.to_json(critiques=body.critiques))

    @routes.get(
        "/health",
        summary="Whether the process works",
        response_model=HealthReply,
        responses={500: _ERRORS[500]},
    )
    async def health() -> dict[str, str]:
        if not service.alive:
            raise EngineFailed("the engine ended with an error; see the server's log")
        return {"status": "ok"}

    @routes.get(
        "/ready",
        summary="Whether requests are taken, and by which judge",
        response_model=ReadyReply,
        responses={503: _ERRORS[503]},
    )
    async def ready() -> dict[str, Any]:
        served = service.served
        if not service.ready:
            raise Unavailable("the server is stopping, or its engine has failed")
        return {
            "status": "ready",
            "model": served.model,
            "judge": served.fingerprint,
            "guided": served.guided,
            "scalar": served.scalar,
            "k": service.defaults.get("k", ScoreOptions.k),
            "limits": dataclasses.asdict(service.limits),
        }

    @routes.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    return routes


async def _stream(service: Service, asked: JudgeRequest, body: JudgeBody) -> Response:
    events = service.judge_events(asked, deadline=body.deadline)
    # What is refused at once is an error's status; later ones are events.
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
        try:
            yield _event(first, body.critiques)
            async for event in events:
                yield _event(event, body.critiques)
        except (UserError, ServiceProblem) as error:
            yield _lines("error", error_of(error)[1])
        finally:
            await events.aclose()

    return StreamingResponse(lines(), media_type=EVENTS)


def _event(event: Progress | Verdict, critiques: bool) -> str:
    if isinstance(event, Progress):
        return _lines("progress", dataclasses.asdict(event))
    return _lines("verdict", event.to_json(critiques=critiques))


def _lines(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _without_nulls(value: Any) -> Any:
    """Messages' fields that are null are not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
