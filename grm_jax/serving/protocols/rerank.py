"""vLLM's scoring routes: /score, /rerank and /generative_scoring, also below /v1.

    {"text_1": query, "text_2": [responses]}   -> {"data": [{"index": 0, "score": 0.72}, ..]}
    {"query": .., "documents": [..], "top_n"}  -> {"results": [{"index": 1, "relevance_score": ..}]}
    {"query": .., "items", "label_token_ids"}  -> {"data": [{"index": 0, "score": 0.9}, ..]}

A query with n texts is one judgement of n responses, which see each other. Scores are the judge's
mean scores within 0..1; with `use_activation: false` as the template has them. Texts may be
`{"content": [text parts]}`; anything else than text is refused. A failed judgement is a 422.

/generative_scoring with labels asks the model as it is, without a judge's template: the score is
the probability that the token behind query and item is the first label. Of its prompts nothing is
cut: one that is too long is refused. Control tokens that stand in a text are text; send ids for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from grm_jax.data.rows import DataError
from grm_jax.judge.request import MOST_LABELS, JudgeRequest, LabelRequest
from grm_jax.judge.verdict import Verdict
from grm_jax.serving.groups import Groups
from grm_jax.serving.protocols.common import (
    StrictBody,
    Whole,
    api_router,
    new_id,
    now,
    readable,
    require_unset,
    scale,
    score_options,
    together,
    unit,
)
from grm_jax.serving.service import Service

Text = str | dict[str, Any]
Texts = Text | list[Text]


class PoolingRequest(StrictBody):
    """What vLLM's scoring requests share."""

    model: str | None = None
    """Any name: there is one judge."""
    user: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    use_activation: bool | None = None
    encoding_format: str | None = None
    priority: Whole | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: str | None = None
    padding: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    def require_supported(self) -> None:
        """Raise DataError for what would change the answer and can not be done."""
        require_unset(
            priority=self.priority not in (None, 0),
            truncate_prompt_tokens=self.truncate_prompt_tokens is not None,
            truncation_side=self.truncation_side is not None,
            padding=self.padding not in (None, "do_not_pad"),
            mm_processor_kwargs=bool(self.mm_processor_kwargs),
        )


class ScoreRequest(PoolingRequest):
    """Queries and texts under one of four pairs of names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None

    def pair(self) -> tuple[str, Texts, str, Texts]:
        """(name, queries, name, texts). Raises DataError unless there is one pair."""
        given = [
            (one, getattr(self, one), two, getattr(self, two))
            for one, two in (
                ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"),
                ("queries", "items"),
            )
            if getattr(self, one) is not None and getattr(self, two) is not None
        ]  # fmt: skip
        names = ("text_1", "text_2", "data_1", "data_2", "queries", "documents", "items")
        if len(given) != 1 or sum(getattr(self, name) is not None for name in names) != 2:
            raise DataError(
                "text_1",
                "no pair, or several",
                "give text_1 and text_2, data_1 and data_2, queries and documents, or queries and "
                "items",
            )
        return given[0]


class ScoreData(BaseModel):
    index: int
    object: str = "score"
    score: float


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreReply(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ScoreData]
    usage: Usage


class RerankRequest(PoolingRequest):
    query: Text
    documents: Texts
    top_n: Whole = Field(0, ge=0)
    """How many to return; 0: all."""
    return_documents: bool | None = None
    """Of Jina's and Cohere's clients; vLLM always returns them."""


class Document(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int
    document: Document
    relevance_score: float


class RerankReply(BaseModel):
    id: str
    model: str
    usage: Usage
    results: list[RerankResult]


class GenerativeScoringRequest(PoolingRequest):
    query: str | list[Whole]
    items: list[str | list[Whole]]
    """Texts or token ids."""
    label_token_ids: list[Whole] | None = Field(None, max_length=MOST_LABELS)
    """Tokens, of which the probability of the first is the score. Without them the judge's score
    is."""
    apply_softmax: bool | None = None
    """Null or true: the probability given that it is one of the labels."""
    item_first: bool | None = None
    """The item comes before the query."""


def router(service: Service, groups: Groups) -> APIRouter:
    routes = api_router("vLLM")

    async def judged(
        query: str, texts: Sequence[str], use_activation: bool | None
    ) -> tuple[Verdict, list[float]]:
        request = JudgeRequest.make(query, texts, options=score_options(service))
        verdict = readable(await service.judge(request))
        rated = scale(service, verdict, request.options)
        raw = use_activation is False
        return verdict, [score if raw else unit(score, rated) for score in verdict.scores]

    def reply(prefix: str, scores: Sequence[float], usage: Usage) -> ScoreReply:
        data = [ScoreData(index=i, score=score) for i, score in enumerate(scores)]
        return ScoreReply(
            id=new_id(prefix), created=now(), model=service.served.model, data=data, usage=usage
        )

    @routes.post("/score", operation_id="score")
    @routes.post("/v1/score", operation_id="score_v1")
    async def score(body: ScoreRequest) -> ScoreReply:
        """The score of each text as a response to its query."""
        body.require_supported()
        one, given_1, two, given_2 = body.pair()
        queries, texts = _texts(one, given_1), _texts(two, given_2)
        if len(queries) not in (1, len(texts)):
            raise DataError(one, f"{len(queries)} for {len(texts)} of {two}", "give 1, or as many")
        places: dict[str, list[int]] = {}  # of the texts of each distinct query
        for i in range(len(texts)):
            places.setdefault(queries[i if len(queries) > 1 else 0], []).append(i)
        found = await together(
            judged(query, [texts[i] for i in where], body.use_activation)
            for query, where in places.items()
        )
        scores = [0.0] * len(texts)
        for where, (_, some) in zip(places.values(), found, strict=True):
            for i, value in zip(where, some, strict=True):
                scores[i] = value
        return reply("embd", scores, _usage([verdict for verdict, _ in found]))

    @routes.post("/rerank", operation_id="rerank")
    @routes.post("/v1/rerank", operation_id="rerank_v1")
    @routes.post("/v2/rerank", operation_id="rerank_v2")
    async def rerank(body: RerankRequest) -> RerankReply:
        """The texts as responses to the query, the best first."""
        body.require_supported()
        (query,) = _texts("query", body.query)
        texts = _texts("documents", body.documents)
        verdict, scores = await judged(query, texts, body.use_activation)
        best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]
        return RerankReply(
            id=new_id("rerank"),
            model=service.served.model,
            usage=_usage([verdict]),
            results=[
                RerankResult(index=i, document=Document(text=texts[i]), relevance_score=scores[i])
                for i in best
            ],
        )

    @routes.post("/generative_scoring")
    async def generative_scoring(body: GenerativeScoringRequest) -> ScoreReply:
        """The probability of the first label behind each prompt of query and item.

        Without labels: the judge's score of each item as a response to the query, within 0..1.
        """
        body.require_supported()
        softmax = body.apply_softmax is not False
        if body.label_token_ids is None:
            require_unset(item_first=bool(body.item_first))
            query, *items = _only_texts(body)
            verdict, scores = await judged(query, items, softmax)
            return reply("generative-scoring", scores, _usage([verdict]))
        asked = LabelRequest(
            _ids_or_text(body.query),
            tuple(map(_ids_or_text, body.items)),
            tuple(dict.fromkeys(body.label_token_ids)),
            item_first=bool(body.item_first),
            special=body.add_special_tokens is not False,
        )
        found = await service.labels(asked)
        scores = [first for first, *_ in found.probabilities(among_labels=softmax)]
        read = found.prompt_tokens
        return reply("generative-scoring", scores, Usage(prompt_tokens=read, total_tokens=read))

    return routes


def _texts(name: str, given: Texts) -> list[str]:
    """The texts of one or several inputs. Raises DataError for an empty list and for media."""
    values = given if isinstance(given, list) else [given]
    if not values:
        raise DataError(name, "an empty list", "give at least one")
    return [_text(name, value) for value in values]


def _text(name: str, value: Text) -> str:
    if isinstance(value, str):
        return value
    parts = value.get("content")
    if set(value) != {"content"} or not isinstance(parts, list) or not parts:
        raise DataError(name, "an object of another form", 'give a text or {"content": [parts]}')
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            what = part.get("type") if isinstance(part, dict) else None
            raise DataError(name, f"a part of type {what!r:.40}", "a judge here reads text alone")
        if not isinstance(part.get("text"), str):
            raise DataError(name, "a text part without text", 'give {"type": "text", "text": ..}')
    return "\n".join(part["text"] for part in parts)


def _ids_or_text(given: str | list[int]) -> str | tuple[int, ...]:
    return given if isinstance(given, str) else tuple(given)


def _only_texts(body: GenerativeScoringRequest) -> list[str]:
    """Query and items. Raises DataError for token ids."""
    texts = []
    for name, given in (
        ("query", body.query),
        *((f"items[{i}]", x) for i, x in enumerate(body.items)),
    ):
        if not isinstance(given, str):
            raise DataError(name, "token ids, and no label_token_ids",
                            "give texts to judge, or label_token_ids")  # fmt: skip
        texts.append(given)
    return texts


def _usage(verdicts: Sequence[Verdict]) -> Usage:
    prompt = sum(verdict.usage.prompt_tokens for verdict in verdicts)
    sampled = sum(verdict.usage.sampled_tokens for verdict in verdicts)
    return Usage(prompt_tokens=prompt, total_tokens=prompt + sampled, completion_tokens=sampled)
