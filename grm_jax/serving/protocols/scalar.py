"""The scalar RM as verl and others call one: vLLM's /classify and SGLang's /v1/embeddings.

    {"input": chat-templated text, "use_activation": false} -> data[i].probs == [raw score]
    {"input": chat-templated text}                          -> data[i].embedding == [raw score]

An input is a whole conversation in the markup of the client's template, or `messages`. Its last
turn is the assistant's, which is scored. /classify gives the sigmoid of the score unless
`use_activation` is false; /v1/embeddings always the raw score. A server without a scalar RM answers
404 and says how to give it one. `usage` counts the tokens that the scalar RM read, in its own chat
template.
"""

from __future__ import annotations

import base64
import math
import struct
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from grm_jax.critique.prompt import Turn
from grm_jax.data.conversation import check_turns, read_turns
from grm_jax.data.rows import DataError, check_text
from grm_jax.serving.groups import Groups
from grm_jax.serving.protocols.common import (
    Whole,
    api_router,
    new_id,
    now,
    require_scalar,
    require_unset,
    together,
)
from grm_jax.serving.protocols.policy_text import read_conversation
from grm_jax.serving.protocols.rerank import PoolingRequest, Usage
from grm_jax.serving.service import Service


class ConversationRequest(PoolingRequest):
    input: str | list[str] | list[int] | list[list[int]] | None = None
    """Whole conversations in a chat template's markup."""
    messages: list[dict[str, Any]] | None = None
    """One conversation, instead of `input`."""

    def conversations(self) -> list[tuple[list[Turn], str]]:
        """(turns, the reply that is scored) of each. Raises DataError."""
        self.require_supported()
        if (self.input is None) == (self.messages is None):
            raise DataError("input", "missing, or beside messages", "give one of the two")
        if self.messages is not None:
            turns = list(read_turns("messages", self.messages))
            if not turns or turns[-1]["role"] != "assistant":
                raise DataError("messages", "the last is not the assistant's",
                                "end with the reply that is scored")  # fmt: skip
            return [_checked("messages", turns[:-1], turns[-1]["content"])]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        if not texts:
            raise DataError("input", "an empty list", "give at least one")
        return [_read(f"input[{i}]", text) for i, text in enumerate(texts)]


class ClassifyRequest(ConversationRequest):
    pass


class ClassifyData(BaseModel):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: Usage


class EmbeddingsRequest(ConversationRequest):
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None


class EmbeddingsData(BaseModel):
    object: str = "embedding"
    embedding: list[float] | str
    index: int


class EmbeddingsReply(BaseModel):
    object: str = "list"
    model: str
    data: list[EmbeddingsData]
    usage: Usage


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("scalar RM")

    async def scored(body: ConversationRequest) -> tuple[list[float], Usage]:
        require_scalar(service)
        given = body.conversations()
        service.limits.check_responses(len(given))
        found = await together(service.scalar(turns, [reply]) for turns, reply in given)
        read = sum(one.prompt_tokens for one in found)
        scores = [score for one in found for score in one.scores]
        return scores, Usage(prompt_tokens=read, total_tokens=read)

    @routes.post("/classify", responses={404: {"description": "No scalar RM"}})
    async def classify(body: ClassifyRequest) -> ClassifyReply:
        """The scalar RM's score of each conversation's last reply."""
        raw = body.use_activation is False
        scores, usage = await scored(body)
        data = [
            ClassifyData(
                index=i, label="LABEL_0", probs=[score if raw else _sigmoid(score)], num_classes=1
            )
            for i, score in enumerate(scores)
        ]
        return ClassifyReply(
            id=new_id("classify"), created=now(), model=service.served.model, data=data,
            usage=usage,
        )  # fmt: skip

    @routes.post("/v1/embeddings", responses={404: {"description": "No scalar RM"}})
    async def embeddings(body: EmbeddingsRequest) -> EmbeddingsReply:
        """The scalar RM's raw score of each conversation's last reply, as an embedding of one."""
        require_unset(dimensions=body.dimensions not in (None, 1))
        packed = body.encoding_format == "base64"
        scores, usage = await scored(body)
        data = [
            EmbeddingsData(index=i, embedding=_packed(score) if packed else [score])
            for i, score in enumerate(scores)
        ]
        return EmbeddingsReply(model=service.served.model, data=data, usage=usage)

    return routes


def _read(name: str, text: Any) -> tuple[list[Turn], str]:
    if not isinstance(text, str):
        raise DataError("input", "token ids of another tokenizer", "give texts, or messages")
    check_text(name, text)
    found = read_conversation(text)
    if found is None:
        raise DataError(
            name,
            "no conversation that ends with the assistant's turn",
            "send what a chat template writes, or messages",
        )
    return _checked(name, list(read_turns(name, list(found[0]))), found[1])


def _checked(name: str, turns: list[Turn], reply: str) -> tuple[list[Turn], str]:
    check_turns(name, tuple(turns))
    return turns, reply


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _packed(score: float) -> str:
    return base64.b64encode(struct.pack("<f", score)).decode()
