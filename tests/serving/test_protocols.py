"""What golden replies do not show: groups over HTTP, failures, what is refused, by protocol."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fakes import FakeSession

from grm_jax.judge.request import LabelRequest
from grm_jax.serving.groups import GroupOptions
from grm_jax.serving.limits import Limits
from grm_jax.serving.protocols import openrlhf

PROMPT = "<|im_start|>user\nCapital of Norway?<|im_end|>\n<|im_start|>assistant\n"
HISTORY = [{"role": "user", "content": "Capital of Norway?"}]


@pytest.fixture
def session(shared) -> FakeSession:
    session = shared[0]
    session.requests.clear()
    session.chats.clear()
    session.labels.clear()
    session.replies.clear()
    return session


@pytest.fixture
def client(session, shared) -> httpx.Client:
    return shared[1]


def get_reward(response: str, prompt: str = PROMPT, label: object = None) -> dict:
    return {"query": [f"{prompt}{response}<|im_end|>"], "prompts": [prompt], "labels": [label]}


def rollout_row(text: str, task: int = 0) -> dict:
    message = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    return {
        "responses_create_params": {"input": HISTORY},
        "response": {"output": [message]},
        "_ng_task_index": task,
    }


def together(client: httpx.Client, path: str, bodies: list[dict]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: client.post(path, json=body), bodies))


TEXTS = [f"answer {i} score={score}" for i, score in enumerate((2, 9, 5, 5))]


@pytest.mark.parametrize(
    ("path", "body", "number"),
    [
        ("/get_reward?group_size=4&k=1&window=30", get_reward, lambda r: r["rewards"][0]),
        (
            "/rm?group_size=4&k=1&window=30",
            lambda text: {"prompt": PROMPT, "response": text, "label": None},
            lambda r: r,
        ),
        (
            "/v1/rollout",
            lambda text: {
                "query": "Capital of Norway?", "response": text, "group_size": 4, "k": 1,
                "window": 30.0,
            },
            lambda r: r["score"],
        ),
    ],
    ids=["openrlhf", "slime", "native"],
)  # fmt: skip
def test_rollouts_of_a_prompt_are_judged_once(session, client, path, body, number):
    replies = together(client, path, [body(text) for text in TEXTS])
    assert [reply.status_code for reply in replies] == [200] * 4
    asked = [request.record.responses for request in session.requests]
    assert asked == [tuple(TEXTS)]
    # The fake judge's third critique adds one to the first response; there is one critique here.
    assert [number(reply.json()) for reply in replies] == [2, 9, 5, 5]


def test_nemo_gyms_rollouts_are_grouped_by_task(serve):
    session = FakeSession()
    client = serve(session, groups=GroupOptions(window=30, size=2))
    rows = [
        rollout_row(text, task) for task in (0, 1) for text in (f"a{task} score=2", "b score=10")
    ]
    replies = [reply.json() for reply in together(client, "/verify", rows)]
    assert len(session.requests) == 2
    assert [reply["_ng_task_index"] for reply in replies] == [0, 0, 1, 1]
    assert replies[1]["reward"] == replies[3]["reward"] == 5.0


def test_a_client_that_goes_away_leaves_its_group(session, client):
    path, body = "/rm?group_size=3&window=1.5&k=1", {"prompt": PROMPT, "label": None}
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(client.post, path, json={**body, "response": "stays score=4"})
        time.sleep(0.2)
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json={**body, "response": "goes"}, timeout=0.3)
        assert stays.result().json() == 4
    assert [request.record.responses for request in session.requests] == [("stays score=4",)]


def test_policys_tokens_do_not_reach_the_judge(session, client):
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT
    client.post("/get_reward?group_size=1", json=get_reward("Oslo.", prompt))
    record = session.requests[0].record
    assert [dict(turn) for turn in record.turns] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of Norway?"},
    ]
    assert record.responses == ("Oslo.",)


def test_a_label_can_be_what_is_judged_against(session, client):
    path = "/get_reward?group_size=1&label=reference&criteria=Be%20right."
    assert client.post(path, json=get_reward("Oslo.", label="Oslo")).status_code == 200
    record = session.requests[0].record
    assert (record.reference, record.principles) == ("Oslo", ("Be right.",))
    reply = client.post(path, json=get_reward("Oslo.", label=None))
    assert reply.status_code == 400 and "label" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward?group_size=1", get_reward("a")),
        ("/rm?group_size=1", {"prompt": PROMPT, "response": "a"}),
        ("/compare", {"conversation_history": HISTORY, "response_objs": [{}, {}]}),
    ],
)
def test_overload_is_503_with_a_time_for_who_knows_no_429(path, body, serve):
    session = FakeSession(slots=1, seconds=0.01)
    client = serve(session, limits=Limits(queue=8))
    session.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/judge", json={"query": "q", "responses": ["a"]})
        while not session.requests:
            time.sleep(0.005)
        reply = client.post(path, json=body)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["type"] == "overloaded"
        session.gate.set()
        assert waiting.result().status_code == 200


def test_nemo_gym_learns_of_overload_by_its_failure_class(serve):
    session = FakeSession(slots=1, seconds=0.01)
    client = serve(session, limits=Limits(queue=8), groups=GroupOptions(window=0))
    session.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/judge", json={"query": "q", "responses": ["a"]})
        while not session.requests:
            time.sleep(0.005)
        reply = client.post("/verify", json=rollout_row("a"))
        session.gate.set()
        waiting.result()
    assert reply.status_code == 200
    assert reply.json()["_ng_failure_class"] == "judge_failed"
    assert reply.json()["_ng_failure_judge_error"].startswith("overloaded")


def test_a_rollout_that_the_judge_can_not_read_is_a_failed_row_of_nemo_gym(client):
    row = rollout_row("a")
    row["responses_create_params"]["input"] = "too long"
    reply = client.post("/verify", json=row).json()
    assert reply["_ng_failure_judge_error"].startswith("refused: ")
    assert client.post("/verify", json={"response": {}}).status_code == 422


def test_openrlhf_hears_before_its_own_time_out(client, monkeypatch):
    assert openrlhf.SECONDS < 180
    monkeypatch.setattr(openrlhf, "SECONDS", 0.2)
    prompt = PROMPT.replace("Capital", "never")
    reply = client.post("/get_reward?group_size=1", json=get_reward("a", prompt))
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/score", {"text_1": "q"}, "no pair"),
        ("/score", {"text_1": "q", "text_2": "a", "items": "b"}, "no pair"),
        ("/score", {"text_1": ["q", "r"], "text_2": ["a", "b", "c"]}, "2 for 3 of text_2"),
        ("/score", {"text_1": "q", "text_2": []}, "empty list"),
        ("/score", {"text_1": "q", "text_2": ["a"], "truncate_prompt_tokens": 5}, "truncate_pro"),
        ("/score", {"text_1": "q", "text_2": ["a"], "priority": 1}, "priority"),
        (
            "/score",
            {"text_1": "q", "text_2": {"content": [{"type": "image_url", "image_url": {}}]}},
            "image_url",
        ),
        ("/rerank", {"query": "q", "documents": []}, "empty list"),
        ("/generative_scoring", {"query": "q", "items": [], "label_token_ids": [1]}, "items"),
        ("/generative_scoring", {"query": "q", "items": ["a"], "label_token_ids": []}, "0 of them"),
        ("/generative_scoring", {"query": "q", "items": ["a", [1]]}, "items[1]: token ids"),
        ("/generative_scoring", {"query": "q", "items": ["a"], "item_first": True}, "item_first"),
        (
            "/generative_scoring",
            {"query": "q", "items": ["a"] * 65, "label_token_ids": [1]},
            "items: 65 of them",
        ),
        ("/classify", {"input": [[1, 2, 3]]}, "token ids"),
        ("/classify", {"input": "just a text"}, "no conversation"),
        ("/classify", {"input": "a", "messages": HISTORY}, "one of the two"),
        ("/classify", {"messages": HISTORY}, "not the assistant's"),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
        ("/get_reward", {"query": ["a"], "prompts": ["b"]}, "does not begin with its prompt"),
        ("/get_reward", {"query": ["a", "a"], "prompts": ["a"]}, "another length"),
        ("/v1/responses", {"input": "q", "metadata": {"response_1": "a"}}, "response_2"),
        ("/v1/rollout", {"query": "q", "response": "a", "colour": 1}, "unknown field"),
    ],
)
def test_what_is_refused_says_why(client, path, body, said):
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_an_unknown_option_of_a_url_is_refused(client):
    reply = client.post("/get_reward?groupsize=8", json=get_reward("a"))
    assert reply.status_code == 422 and "groupsize" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/classify", "/v1/embeddings"])
def test_without_a_scalar_rm_the_server_says_how_to_give_it_one(serve, path):
    client = serve(FakeSession(scalar=False))
    reply = client.post(path, json={"input": f"{PROMPT}a<|im_end|>"})
    assert reply.status_code == 404 and "--scalar" in reply.json()["error"]["message"]


def test_responses_to_one_query_see_each_other(session, client):
    client.post("/score", json={"text_1": ["q", "r", "q"], "text_2": ["a", "b", "c"]})
    asked = sorted(request.record.responses for request in session.requests)
    assert asked == [("a", "c"), ("b",)]


def test_the_probability_of_the_first_label_is_the_score(session, client):
    """Over the whole vocabulary or among the labels; a label that is given twice counts once."""
    asked = {"query": "q", "items": ["score=4", [1, 2]], "label_token_ids": [5, 6, 5]}

    def scores(**changed) -> list[float]:
        reply = client.post("/generative_scoring", json=asked | changed).json()
        assert reply["usage"] == {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0}
        return [row["score"] for row in reply["data"]]

    assert scores()[0] == scores(apply_softmax=None)[0]
    assert scores()[0] == pytest.approx(math.exp(-3) / (math.exp(-3) + math.exp(-1)))
    assert scores(apply_softmax=False)[0] == pytest.approx(math.exp(-3))
    scores(query=[7, 8], item_first=True, add_special_tokens=False)
    assert session.labels[0] == LabelRequest("q", ("score=4", (1, 2)), (5, 6))
    assert session.labels[-1] == LabelRequest(
        (7, 8), ("score=4", (1, 2)), (5, 6), item_first=True, special=False
    )
    assert not session.requests, "no critique is written"


# OpenAI's chat

SAY = {"messages": [{"role": "user", "content": "Say hello."}]}


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"logit_bias": {"5": 1}},
        {"frequency_penalty": 0.5}, {"presence_penalty": 1}, {"top_logprobs": 3}, {"best_of": 2},
        {"functions": [{}]}, {"modalities": ["audio"]}, {"reasoning_effort": "high"},
        {"repetition_penalty": 1.1}, {"stop_token_ids": [7]}, {"guided_json": {}},
        {"continue_final_message": True}, {"prediction": {"type": "content"}}, {"colour": "red"},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"grm": {"responses": ["a"], "query": "q"}}, {"grm": {"responses": ["a"]}, "n": 2},
        {"grm": {"responses": ["a"]}, "stop": "x"}, {"metadata": {"grm": "{"}},
        {"metadata": {"grm": 5}}, {"grm": {"responses": ["a"], "colour": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_chats_field_that_can_not_be_done_is_refused_by_name(session, client, field):
    reply = client.post("/v1/chat/completions", json={**SAY, **field})
    assert reply.status_code == 400
    assert any(name in reply.json()["error"]["message"] for name in (*field, "colour"))
    assert not session.chats and not session.requests


def test_what_clients_send_beside_is_taken(session, client):
    beside = {
        "user": "u", "store": False, "tools": [], "tool_choice": "none", "logit_bias": {},
        "frequency_penalty": 0, "presence_penalty": 0.0, "top_logprobs": 0, "logprobs": False,
        "parallel_tool_calls": True, "service_tier": "auto", "stream": False, "stop": None,
        "metadata": {"run": "7"}, "response_format": {"type": "text"}, "n": 1, "top_p": 1,
        "reasoning_effort": None, "stream_options": None, "modalities": ["text"],
    }  # fmt: skip
    reply = client.post("/v1/chat/completions", json={**SAY, **beside})
    assert reply.status_code == 200, reply.text


def test_sampling_reaches_the_model(session, client):
    body = {"n": 3, "seed": -1, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1}
    client.post("/v1/chat/completions", json={**SAY, **body, "max_tokens": 9})
    ((messages, sampling, n, seed),) = session.chats
    assert [dict(turn) for turn in messages] == SAY["messages"]
    assert (n, seed) == (3, 2**63 - 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.25, 0.5, 7, 0.1,
    )  # fmt: skip
    assert sampling.max_new_tokens == 9


def test_a_whole_number_with_a_point_is_one_and_a_text_is_none(session, client):
    path = "/v1/chat/completions"
    assert client.post(path, json={**SAY, "n": 2.0, "max_tokens": 9.0}).status_code == 200
    for value in (2.5, "2", True, [2]):
        assert client.post(path, json={**SAY, "n": value}).status_code == 422


def test_a_reply_ends_at_the_first_stop(session, client):
    session.replies = ["one STOP two END three"]
    reply = client.post("/v1/chat/completions", json={**SAY, "stop": ["END", "STOP", ""]}).json()
    assert reply["choices"][0]["message"]["content"] == "one "
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_json_is_cut_out_of_a_reply(session, client):
    session.replies = ['Sure! ```json\n{"ok": true}\n```', '{"ok": "yes"}']
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    first = client.post("/v1/chat/completions", json={**SAY, "response_format": form})
    assert json.loads(first.json()["choices"][0]["message"]["content"]) == {"ok": True}
    second = client.post("/v1/chat/completions", json={**SAY, "seed": 1, "response_format": form})
    assert second.status_code == 400 and "'yes' is not" in second.json()["error"]["message"]


def test_a_failed_judgement_in_a_chat_is_named(client):
    body = {"messages": HISTORY, "grm": {"responses": ["unreadable", "b"], "k": 2}}
    reply = client.post("/v1/chat/completions", json=body).json()
    said = json.loads(reply["choices"][0]["message"]["content"])
    assert (said["failure"], said["scores"], said["winner"]) == ("no_box", [], None)
    assert reply["grm"]["failures"] == {"no_box": 2}
