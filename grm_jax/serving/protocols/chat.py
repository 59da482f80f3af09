"""OpenAI's /v1/chat/completions and /v1/models.

Plain messages are what the model goes on with, by its chat template and nothing else:

    {"messages": [..], "n": 4, "seed": 0, "temperature": 0.7}        -> n choices

With responses, the conversation is judged, and the assistant's text is the verdict as JSON:

    {"messages": [..], "grm": {"responses": ["a", "b"], "k": 8}}     -> one choice, and "grm": {..}

`grm` takes what /v1/judge takes, without the query. It is what `extra_body={"grm": ..}` of OpenAI's
client sends; clients without such a way put it into `metadata` as `"grm"`, as an object or as JSON.

`response_format` is kept or refused: a reply that does not follow it is a 400. A verdict is cut to
the fields that a schema with `additionalProperties: false` names.

A stream is sent when all of it is there, as OpenAI's chunks. Fields that change nothing here are
taken; those that would change the answer and can not be done are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ConfigDict, Field

from grm_jax.data.conversation import check_turns, read_turns
from grm_jax.data.rows import DataError
from grm_jax.judge.request import JudgeRequest
from grm_jax.judge.verdict import Completion
from grm_jax.serving.groups import Groups
from grm_jax.serving.problems import NotOffered
from grm_jax.serving.protocols.common import Body, Whole, api_router, new_id, now, require_unset
from grm_jax.serving.protocols.json_reply import ReplySchema, json_text
from grm_jax.serving.schemas import ErrorReply
from grm_jax.serving.service import Chat, Service

# What clients send beside and that changes nothing here.
_HARMLESS = (
    "user", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "cache_salt", "parallel_tool_calls", "request_id",
    "spaces_between_special_tokens",
)  # fmt: skip
# Of fields that are not read: the values that ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "length_penalty": (1,), "top_logprobs": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "logit_bias": ({},),
    "modalities": (["text"],), "best_of": (1,), "use_beam_search": (False,), "echo": (False,),
    "ignore_eos": (False,), "min_tokens": (0,), "stop_token_ids": ([],),
    "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "return_token_ids": (False,), "priority": (0,),
}  # fmt: skip


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(Body):
    """Of OpenAI's API; `top_k` and `min_p` are vLLM's."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    """Any name: there is one judge."""
    n: Whole | None = Field(None, ge=1)
    seed: Whole | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    grm: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def key(self) -> int:
        """The seed as a key of randomness: OpenAI allows negative ones."""
        return 0 if self.seed is None else self.seed % 2**63

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]

    def require_supported(self) -> None:
        """Raise DataError for a field that would change the answer and is not done."""
        for name, value in (self.model_extra or {}).items():
            neutral = value is None or value in _NEUTRAL.get(name, ())
            require_unset(**{name: not neutral and name not in _HARMLESS})

    def judged(self) -> Mapping[str, Any] | None:
        """What `grm` says; None for a plain chat."""
        found = self.grm if self.grm is not None else (self.metadata or {}).get("grm")
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError:
                raise DataError("metadata.grm", "no JSON", 'give {"responses": [..]}') from None
        if found is not None and not isinstance(found, Mapping):
            name = "grm" if self.grm is not None else "metadata.grm"
            raise DataError(name, "no object", 'give {"responses": [..]}')
        return found

    def schema(self) -> ReplySchema | None:
        """Of `response_format`; None for any JSON object. Raises DataError for another format."""
        assert self.response_format is not None
        kind = self.response_format.get("type")
        if kind == "json_object":
            return None
        inner = self.response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if kind != "json_schema" or not isinstance(schema, dict):
            raise DataError(
                "response_format",
                "of no known type, or without its schema",
                'give {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
                '"json_schema": {"name": .., "schema": ..}}',
            )
        return ReplySchema(schema)

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.get("type") != "text"


@dataclasses.dataclass
class _Choice:
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None = None


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("OpenAI")

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        responses={
            200: {
                "description": "A `chat.completion`; with `stream`, events of its chunks.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        },
    )
    async def complete(body: ChatRequest) -> Response:
        """Go on with a conversation, or judge responses to it."""
        body.require_supported()
        schema = body.schema() if body.wants_json else None
        judged = body.judged()
        if judged is None:
            choices, usage = await _generate(service, body, schema)
            extra = {}
        else:
            choices, usage, extra = await _judge(service, body, judged, schema)
        head = {"id": new_id("chatcmpl"), "created": now(), "model": service.served.model}
        if body.stream:
            return StreamingResponse(
                _events(head, choices, usage, extra, body), media_type="text/event-stream"
            )
        shown = [
            {
                "index": i,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(choices)
        ]
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": shown, "usage": usage, **extra}
        )

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(service)]}

    @routes.get(
        "/v1/models/{name:path}",
        responses={404: {"model": ErrorReply, "description": "No model of that name."}},
    )
    async def model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        if name != service.served.model:
            raise NotOffered(f"no model of that name; this server has {service.served.model!r}")
        return _model(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    served = service.served
    return {
        "id": served.model, "object": "model", "created": 0, "owned_by": "grm_jax",
        "max_model_len": served.longest_prompt + served.max_new_tokens,
        "grm": {"judge": served.fingerprint, "guided": served.guided, "scalar": served.scalar},
    }  # fmt: skip


async def _generate(
    service: Service, body: ChatRequest, schema: ReplySchema | None
) -> tuple[list[_Choice], dict[str, Any]]:
    turns = read_turns("messages", _without_nulls(body.messages))
    check_turns("messages", turns)
    completions = await service.chat(
        Chat(
            tuple((turn["role"], turn["content"]) for turn in turns),
            n=body.n or 1,
            seed=body.key,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            max_new_tokens=body.limit,
        )
    )
    choices = [_choice(completion, body) for completion in completions]
    if body.wants_json:
        for choice in choices:
            choice.text = json_text(choice.text, schema)
    prompt = completions[0].prompt_tokens
    return choices, _usage(prompt, sum(len(completion.tokens) for completion in completions))


def _choice(completion: Completion, body: ChatRequest) -> _Choice:
    """The text up to the first stop."""
    text, reason = completion.text, completion.finish_reason
    cuts = [at for stop in body.stops if (at := text.find(stop)) >= 0]
    if cuts:
        text, reason = text[: min(cuts)], "stop"
    shown = None
    if body.logprobs:
        pairs = zip(completion.tokens, completion.logprobs, strict=True)
        content = [
            # vLLM's way to name a token by its id
            {"token": f"token_id:{token}", "logprob": value, "bytes": None, "top_logprobs": []}
            for token, value in pairs
        ]
        shown = {"content": content, "refusal": None}
    return _Choice(text, reason, shown)


async def _judge(
    service: Service, body: ChatRequest, asked: Mapping[str, Any], schema: ReplySchema | None
) -> tuple[list[_Choice], dict[str, Any], dict[str, Any]]:
    require_unset(
        n=body.n not in (None, 1), top_p=body.top_p not in (None, 1),
        top_k=(body.top_k or 0) > 0, min_p=bool(body.min_p), stop=bool(body.stops),
        logprobs=bool(body.logprobs),
    )  # fmt: skip
    if "query" in asked:
        raise DataError("grm.query", "the messages are the query", "leave it out")
    said = {"query": _without_nulls(body.messages), **_without_nulls(asked)}
    given = {"temperature": body.temperature, "max_new_tokens": body.limit}
    given["seed"] = None if body.seed is None else body.key
    request: JudgeRequest = service.request(
        {**{name: value for name, value in given.items() if value is not None}, **said}
    )
    verdict = await service.judge(request)
    text: dict[str, Any] = json.loads(json.dumps(verdict.to_json(critiques=False)))
    if schema is not None:
        names = list(text)
        text = schema.project(text)
        problem = schema.problem(text)
        if problem is not None:
            raise DataError(
                "response_format",
                f"a verdict does not follow it ({problem})",
                f"ask for some of {', '.join(names)}",
            )
    usage = _usage(verdict.usage.prompt_tokens, verdict.usage.sampled_tokens)
    return [_Choice(json.dumps(text), "stop")], usage, {"grm": verdict.to_json()}


def _usage(prompt: int, sampled: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled,
    }  # fmt: skip


def _events(
    head: dict[str, Any], choices: Sequence[_Choice], usage: dict[str, Any],
    extra: dict[str, Any], body: ChatRequest,
) -> Iterator[str]:  # fmt: skip
    """OpenAI's chunks: of each choice its role, its text, its end; then the usage if asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    tail = {"usage": None} if with_usage else {}

    def chunk(i: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return _event({**head, "choices": [choice], **tail})

    for i, choice in enumerate(choices):
        yield chunk(i, {"role": "assistant", "content": ""})
        yield chunk(i, {"content": choice.text}, logprobs=choice.logprobs)
        yield chunk(i, {}, finish_reason=choice.finish_reason)
    if with_usage or extra:
        shown = {"usage": usage} if with_usage else {}
        yield _event({**head, "choices": [], **shown, **extra})
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _without_nulls(value: Any) -> Any:
    """Messages' fields that are null are not there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
