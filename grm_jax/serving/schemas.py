"""The JSON of the native route, for its OpenAPI document and for checks of types.

What a request means is `JudgeRequest`'s business; a test holds the names of both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from grm_jax.judge.prompts import OrderMode
from grm_jax.judge.request import MOST_RESPONSES, MOST_SAMPLES, Method

Role = Literal["system", "developer", "user", "assistant", "tool"]
Filled = Annotated[str, Field(pattern=r"\S")]


class _Strict(BaseModel):
    """No field that is not known, no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


class Message(_Strict):
    """One message; content is text."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class JudgeBody(_Strict):
    """A query with its responses, and how they are judged. Options that are left out, or null, are
    the server's."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "What is the capital of Norway?",
                    "responses": ["Oslo.", "Bergen, on the west coast."],
                    "criteria": "The answer is correct.",
                    "k": 4,
                    "seed": 0,
                }
            ]
        }
    )

    query: Filled | list[Message] = Field(
        description="A text, or messages of which the last is the user's."
    )
    responses: list[str | list[Message]] = Field(
        min_length=1, max_length=MOST_RESPONSES, description="What is judged."
    )
    reference: str | None = Field(None, description="An answer to judge against.")
    principles: Annotated[list[Filled], Field(min_length=1)] | None = Field(
        None, description="What to judge by, instead of the judge's own principles."
    )
    criteria: Filled | Annotated[list[Filled], Field(min_length=1)] | None = Field(
        None, description="What counts, in words; added to the principles."
    )
    k: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="Critiques to sample.")
    seed: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, description="0 is greedy.")
    max_new_tokens: int | None = Field(None, ge=1, le=2**20, description="Of a critique.")
    order: OrderMode | None = Field(None, description="How the samples see the responses.")
    rating: bool | None = Field(
        None, description="Rate a single response from 1 to 10 instead of as correct or not."
    )
    method: Method | None = Field(None, description="How critiques are put together.")
    k_meta: int | None = Field(None, ge=1, description="Critiques that vote with `guided`.")
    expected: bool | None = Field(None, description="Vote with expected scores.")
    scalar_weight: float | None = Field(None, ge=0, description="With `hybrid`.")
    adaptive: float | None = Field(
        None, ge=0, le=1, description="Stop sampling at this probability of another winner."
    )
    threshold: float | None = Field(None, description="Of single responses, with `adaptive`.")
    at_once: int | None = Field(
        None, ge=2, le=MOST_RESPONSES,
        description="Most responses that a critique reads; more are dealt into groups, anew for "
        "each critique.",
    )  # fmt: skip
    stream: bool = Field(False, description="Answer with server-sent events.")
    critiques: bool = Field(True, description="Whether the reply holds every critique's text.")
    deadline: float | None = Field(None, gt=0, description="Seconds until it is given up.")

    @field_validator("k", "seed", "max_new_tokens", "k_meta", "at_once", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """8.0 is an integer of JSON, as it is of JSON Schema."""
        return int(value) if type(value) is float and value.is_integer() else value


OF_THE_ROUTE = ("stream", "critiques", "deadline")


class CritiqueReply(BaseModel):
    """One critique; `votes`: whether it is among those that decide; `order`: the responses as they
    were shown; `groups`: where `at_once` dealt them into groups, those that were shown together."""

    scores: list[float] | None
    failure: str | None
    principles: str
    critique: str
    order: list[int]
    groups: list[list[int]] | None
    meta: float | None
    expected: list[float] | None
    votes: bool
    tokens: int
    finish_reason: str


class UsageReply(BaseModel):
    prompt_tokens: int
    sampled_tokens: int
    samples: int


class VerdictReply(BaseModel):
    """A verdict. Lists by response stand in the request's order. Where `failure` is set no critique
    was readable: there are no numbers, and the lists are empty."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="A digest of the request's texts.")
    method: str
    scores: list[float] = Field(description="Mean score of each response.")
    totals: list[float] = Field(description="Sums of the scores.")
    values: list[float] = Field(description="What ranks the responses.")
    rewards: list[float] = Field(description="Ranks of the values from 0 to 1.")
    best: list[int]
    winner: int | None
    tie: bool
    std: list[float]
    agreement: float | None
    failure: str | None
    failures: dict[str, int]
    scalar: list[float] | None
    critiques: list[CritiqueReply] | None = None
    usage: UsageReply
    judge: str = Field(description="Fingerprint of the weights and templates.")
    seed: int
    seconds: float


class ErrorFields(BaseModel):
    type: str
    message: str
    field: str | None = None


class ErrorReply(BaseModel):
    """Every error of every native route."""

    error: ErrorFields


class HealthReply(BaseModel):
    status: Literal["ok"]


class ReadyReply(BaseModel):
    status: Literal["ready"]
    model: str
    judge: str
    guided: bool
    scalar: bool
    k: int
    limits: dict[str, float | None]
