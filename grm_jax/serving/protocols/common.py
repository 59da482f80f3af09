"""What the protocols share: failures in a protocol's form, the options of a URL, other scales.

Errors have the application's form, see `replies.py`; a mistake of the user is a `DataError`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from grm_jax.data.rows import DataError
from grm_jax.judge.request import MOST_SAMPLES, JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import Verdict
from grm_jax.serving.groups import Share
from grm_jax.serving.problems import JudgementFailed, NotOffered, ServiceProblem
from grm_jax.serving.replies import error_body
from grm_jax.serving.schemas import ErrorReply
from grm_jax.serving.service import Service

T = TypeVar("T")


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer as JSON Schema has it: 8.0 is one."""


class Body(BaseModel):
    """A client's JSON: no text for a number. Fields that are not known are left alone, as clients
    of other versions send more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StrictBody(BaseModel):
    """A client's JSON of which every field is known, so that none is ignored in silence."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class BusyRoute(APIRoute):
    """For clients that know "it worked" and "ask again" alone: 503 for all that has no answer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except ServiceProblem as error:
                after = error.retry_after
                headers = {} if after is None else {"Retry-After": str(after)}
                return JSONResponse(error_body(error.kind, str(error)), 503, headers)

        return handler


def api_router(tag: str, route: type[APIRoute] = APIRoute) -> APIRouter:
    """A router whose errors stand in the OpenAPI document."""
    errors = {
        400: "What is asked can not be done.",
        401: "The server's token is missing or another one.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        422: "A field of another type, or a judgement without a readable critique.",
        429: "Too much waits; see the header Retry-After.",
        500: "An error of the server.",
        503: "No answer now; Retry-After says when asking again makes sense.",
        504: "No answer before the deadline.",
    }
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": said} for status, said in errors.items()
    }
    return APIRouter(route_class=route, tags=[tag], responses=responses)


class RolloutOptions(BaseModel):
    """What the URL of a protocol with one rollout a request may say, as its body has no place."""

    model_config = ConfigDict(extra="forbid")

    group_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Rollouts of a prompt: the group is judged when all are there.",
    )
    window: float | None = Field(
        None, ge=0, le=100, description="Seconds that a rollout waits for others of its prompt."
    )
    k: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="Critiques of a group.")
    criteria: str | None = Field(None, pattern=r"\S", description="What counts, in words.")
    reward: Literal["score", "rank"] = Field(
        "score", description="Mean score on the template's scale, or rank in the group from 0 to 1."
    )
    label: Literal["ignore", "reference"] = Field(
        "ignore", description="`reference`: the label is an answer to judge against."
    )

    def value(self, share: Share) -> float:
        return share.score if self.reward == "score" else share.rank

    def request(self, service: Service, query: Any, response: str, label: Any) -> JudgeRequest:
        """The request of one rollout. Raises UserError."""
        reference = None
        if self.label == "reference":
            if not isinstance(label, str) or not label.strip():
                raise DataError("label", "no text", "with label=reference, send the answer as text")
            reference = label
        return JudgeRequest.make(
            query,
            [response],
            reference=reference,
            criteria=self.criteria,
            options=score_options(service, k=self.k),
        )


def score_options(service: Service, **given: Any) -> ScoreOptions:
    """The server's options with what a request gives. A single response is rated on the scale of
    several, so that a rollout that stays alone can be compared."""
    said = {name: value for name, value in given.items() if value is not None}
    return ScoreOptions(**{"rating": True, **service.defaults, **said})


def scale(service: Service, verdict: Verdict, options: ScoreOptions) -> tuple[float, float]:
    """The range of the verdict's scores."""
    alone = len(verdict.scores) == 1 and not options.rating
    return service.served.single_scale if alone else service.served.scale


def unit(score: float, scale: tuple[float, float]) -> float:
    """A score within 0..1."""
    low, high = scale
    return (score - low) / (high - low)


def readable(verdict: Verdict) -> Verdict:
    """The verdict. Raises JudgementFailed for one without numbers."""
    if verdict.failure is not None:
        raise JudgementFailed(verdict)
    return verdict


def require_unset(**given: bool) -> None:
    """Raise DataError naming the first field that is given: what it asks for can not be done."""
    for name, is_given in given.items():
        if is_given:
            raise DataError(name, "not supported here, and it would change the answer",
                            "leave it out")  # fmt: skip


def require_scalar(service: Service) -> None:
    """Raise NotOffered where the server has no scalar RM."""
    if not service.served.scalar:
        raise NotOffered(
            "this server has no scalar RM; start it with --scalar PATH, or ask the judge itself at "
            "/score"
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first error is raised at once, and the other calls are ended."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
