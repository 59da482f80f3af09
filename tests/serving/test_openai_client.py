"""OpenAI's own client against a server on a socket."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from fakes import FakeSession
from pydantic import BaseModel

openai = pytest.importorskip("openai")


@pytest.fixture
def session(shared) -> FakeSession:
    session = shared[0]
    session.requests.clear()
    session.chats.clear()
    session.replies.clear()
    return session


@pytest.fixture
def client(session, shared) -> httpx.Client:
    return shared[1]


@pytest.fixture
def api(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def test_chat(api, session):
    reply = api.chat.completions.create(
        model="judge", messages=[{"role": "user", "content": "Hello there"}], n=2, seed=5,
        temperature=0.5, max_tokens=50,
    )  # fmt: skip
    assert [c.message.content for c in reply.choices] == [
        "Hello there [5.0 at 0.5]", "Hello there [5.1 at 0.5]",
    ]  # fmt: skip
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_what_the_reply_says(api):
    asked = {"model": "judge", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "seed": 1}
    whole = api.chat.completions.create(**asked)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    options = {"include_usage": True}
    for chunk in api.chat.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert reasons == {0: "stop", 1: "stop"}
    assert usage == whole.usage


class Verdict(BaseModel):
    winner: int | None
    scores: list[float]


def test_structured_output_of_a_verdict(api):
    reply = api.chat.completions.parse(
        model="judge",
        messages=[{"role": "user", "content": "Capital of Norway?"}],
        response_format=Verdict,
        extra_body={"grm": {"responses": ["Bergen. score=2", "Oslo. score=9"], "k": 1}},
    )
    assert reply.choices[0].message.parsed == Verdict(winner=1, scores=[2.0, 9.0])
    assert reply.grm["winner"] == 1 and len(reply.grm["critiques"]) == 1


def test_structured_output_of_a_model(api, session):
    session.replies = ['I would say {"winner": null, "scores": [5, 5]}']
    messages = [{"role": "user", "content": "Judge."}]
    reply = api.chat.completions.parse(model="x", messages=messages, response_format=Verdict)
    assert reply.choices[0].message.parsed == Verdict(winner=None, scores=[5, 5])
    with pytest.raises(openai.BadRequestError, match="response_format"):
        api.chat.completions.parse(model="x", messages=messages, seed=1, response_format=Verdict)


def test_models(api):
    (model,) = api.models.list().data
    assert model.id == "fake" and api.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")


def test_errors_are_the_clients_own(api, serve):
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        api.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "Hi"}], logit_bias={"5": 1}
        )
    secret = serve(FakeSession(), token="secret")
    url = f"{secret.base_url}/v1"
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="no").chat.completions.create(
            model="x", messages=messages
        )
    known = openai.OpenAI(base_url=url, api_key="secret")
    assert known.chat.completions.create(model="x", messages=messages).choices


def test_embeddings_are_the_scalar_rms_score(api):
    text = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nscore=8<end_of_turn>\n"
    packed = api.embeddings.create(model="judge", input=[text])  # base64 on the wire
    plain = api.embeddings.create(model="judge", input=text, encoding_format="float")
    assert packed.data[0].embedding == plain.data[0].embedding == [3.0]


def test_responses(api):
    reply = api.responses.create(
        model="judge", input="Capital of Norway?",
        metadata={"response_1": "Oslo. score=10", "response_2": "Bergen. score=1"},
    )  # fmt: skip
    assert reply.output_text.startswith('{"score_1": 5.0')
    assert reply.status == "completed" and reply.usage.total_tokens > 0


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("nemo_gym_responses", "responses.Response"),  # NeMo Gym reads it as this
        ("nemo_gym_responses_failed", "responses.Response"),
        ("openai_chat", "chat.ChatCompletion"),
        ("openai_chat_logprobs", "chat.ChatCompletion"),
        ("openai_chat_judged", "chat.ChatCompletion"),
        ("openai_model", "Model"),
        ("sglang_embeddings", "CreateEmbeddingResponse"),
    ],
)
def test_replies_are_of_openais_types(client, case, kind):
    asked = json.loads((Path(__file__).with_name("golden") / f"{case}.json").read_text())["request"]
    reply = client.request(asked["method"], asked["path"], json=asked.get("json"))
    model = openai.types
    for name in kind.split("."):
        model = getattr(model, name)
    model.model_validate(reply.json())
