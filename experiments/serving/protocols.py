"""What the load test sends by each protocol, and how it reads the replies.

A task is one query with its responses. Most protocols send it as one request; those of trainers
send one rollout a request, all of a task at once, and the server puts them together again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx

from grm_jax.judge.request import JudgeRequest

Request = tuple[str, dict[str, Any]]  # path, body


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to be judged. number: names it; its texts are its own."""

    number: int
    protocol: str
    query: str
    responses: tuple[str, ...]
    k: int


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to ask for a task.

    Attributes:
      path: the server's route.
      share: how often it is chosen.
      requests: of a task.
      read: the replies as what must be the same in every run. Raises AssertionError for replies
        that are not the task's.
      least: responses that a task must have.
      scalar: whether it asks the scalar RM.
    """

    path: str
    share: int
    requests: Callable[[Task], list[Request]]
    read: Callable[[Task, Sequence[httpx.Response]], Any]
    least: int = 1
    scalar: bool = False


def _one(path: str, share: int, body, read, **more: Any) -> Protocol:
    """A protocol that sends a task as one request."""
    return Protocol(
        path, share, lambda task: [(path, body(task))], lambda task, got: read(task, got[0]), **more
    )


State = Literal["answer", "failed", "busy", "wrong"]


def state(reply: httpx.Response) -> State:
    """What a reply is: an answer; that the judge had nothing to say of it, which trying again would
    not change; that it has to be asked again; or an error."""
    if reply.status_code == 200:
        row = reply.json() if reply.headers["content-type"] == "application/json" else None
        if not isinstance(row, dict) or "_ng_failure_judge_error" not in row:
            return "answer"
        kind = row["_ng_failure_judge_error"].partition(":")[0]  # NeMo Gym's failures are 200, too
    else:
        kind = reply.json()["error"]["type"]
    if kind == "judgement_failed":
        return "failed"
    return "busy" if kind in ("overloaded", "unavailable") else "wrong"


# One request a task


def _native(task: Task, **more: Any) -> dict[str, Any]:
    return {"query": task.query, "responses": list(task.responses), "k": task.k, **more}


def _verdict(task: Task, said: dict[str, Any]) -> Any:
    own = JudgeRequest.make(task.query, task.responses).record.id
    assert said["id"] == own, f"task {task.number} got another one's verdict"
    assert len(said["critiques"]) == task.k
    texts = [critique["critique"] for critique in said["critiques"]]
    return [said["scores"], said["failures"], said["scalar"], texts]


def _judge(task: Task, reply: httpx.Response) -> Any:
    return _verdict(task, reply.json())


def _events(task: Task, reply: httpx.Response) -> Any:
    blocks = [block.split("\n") for block in reply.text.split("\n\n") if block]
    (verdict,) = [lines[1][6:] for lines in blocks if lines[0] == "event: verdict"]
    return _verdict(task, json.loads(verdict))


def _score(task: Task, reply: httpx.Response) -> Any:
    data = reply.json()["data"]
    assert [row["index"] for row in data] == list(range(len(task.responses)))
    return [row["score"] for row in data]


def _rerank(task: Task, reply: httpx.Response) -> Any:
    rows = reply.json()["results"]
    for row in rows:
        assert row["document"]["text"] == task.responses[row["index"]]
    assert len(rows) == len(task.responses)
    return [[row["index"], row["relevance_score"]] for row in rows]


def _compare(task: Task, reply: httpx.Response) -> Any:
    rewards = reply.json()["rewards"]
    assert len(rewards) == len(task.responses)
    return rewards


def _chat(task: Task, reply: httpx.Response) -> Any:
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2))
    return [choice["message"]["content"] for choice in choices]


def _raw(task: Task, reply: httpx.Response) -> Any:
    (row,) = reply.json()["data"]
    return row["probs"]


def _turns(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.query}]


def _output(text: str) -> dict[str, Any]:
    """A response as OpenAI's Responses API has it."""
    return {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}


# One rollout a request


def _members(task: Task, values: Sequence[Any]) -> Any:
    """What each rollout got. Of equal responses it is chance which place in the group is whose."""
    return sorted([text, value] for text, value in zip(task.responses, values, strict=True))


def _markup(task: Task) -> str:
    """The prompt as a policy reads it."""
    return f"<|im_start|>user\n{task.query}<|im_end|>\n<|im_start|>assistant\n"


def _group(task: Task) -> str:
    return f"group_size={len(task.responses)}&k={task.k}&window=60"


def _get_reward(task: Task) -> list[Request]:
    prompt = _markup(task)
    return [
        (
            f"/get_reward?{_group(task)}",
            {"query": [f"{prompt}{text}<|im_end|>"], "prompts": [prompt], "labels": [None]},
        )
        for text in task.responses
    ]


def _rewards(task: Task, replies: Sequence[httpx.Response]) -> Any:
    said = [reply.json() for reply in replies]
    sizes = [row["extra_logs"]["grm_group_size"] for row in said]
    assert sizes == [[len(replies)]] * len(replies), f"task {task.number} was split"
    return _members(task, [row["rewards"] for row in said])


def _rm(task: Task) -> list[Request]:
    path = f"/rm?detail=true&{_group(task)}"
    return [(path, {"prompt": _turns(task), "response": text}) for text in task.responses]


def _details(task: Task, replies: Sequence[httpx.Response]) -> Any:
    said = [reply.json() for reply in replies]
    assert all(row["group_size"] == len(said) for row in said), f"task {task.number} was split"
    return _members(task, [row["score"] for row in said])


def _verify(task: Task) -> list[Request]:
    return [
        (
            "/verify",
            {
                "responses_create_params": {"input": _turns(task)},
                "response": _output(text),
                "_ng_task_index": task.number,
                "_ng_rollout_index": i,
            },
        )
        for i, text in enumerate(task.responses)
    ]


def _verified(task: Task, replies: Sequence[httpx.Response]) -> Any:
    said = [reply.json() for reply in replies]
    assert {row["_ng_task_index"] for row in said} == {task.number}
    for i, (text, row) in enumerate(zip(task.responses, said, strict=True)):
        assert (row["_ng_rollout_index"], row["response"]) == (i, _output(text))
    return _members(task, [row["reward"] for row in said])


def _rollout(task: Task) -> list[Request]:
    how = {"query": task.query, "group_size": len(task.responses), "k": task.k, "window": 60}
    return [
        ("/v1/rollout", {**how, "timeout": 900, "scope": str(task.number), "response": text})
        for text in task.responses
    ]


def _shares(task: Task, replies: Sequence[httpx.Response]) -> Any:
    own = JudgeRequest.make(task.query, sorted(task.responses)).record.id
    said = [reply.json() for reply in replies]
    assert all(row["verdict"]["id"] == own for row in said), f"task {task.number} was split"
    assert sorted(row["index"] for row in said) == list(range(len(said))), "one place for two"
    return _members(task, [row["score"] for row in said])


PROTOCOLS: dict[str, Protocol] = {
    "judge": _one("/v1/judge", 8, _native, _judge),
    "judge, events": _one("/v1/judge", 3, lambda task: _native(task, stream=True), _events),
    "score": _one(
        "/v1/score", 3,
        lambda t: {"model": "judge", "text_1": t.query, "text_2": list(t.responses)},
        _score,
    ),
    "rerank": _one(
        "/v1/rerank", 3,
        lambda t: {"model": "judge", "query": t.query, "documents": list(t.responses)},
        _rerank,
    ),
    "compare": _one(
        "/compare", 2,
        lambda t: {
            "conversation_history": _turns(t), "response_objs": [_output(r) for r in t.responses]
        },
        _compare,
        least=2,  # NeMo Gym's route answers a single one without a judge
    ),
    "chat": _one(
        "/v1/chat/completions", 2,
        lambda t: {
            "model": "judge", "messages": _turns(t), "n": 2, "seed": t.number, "max_tokens": 16
        },
        _chat,
    ),
    "classify": _one(
        "/classify", 1,
        lambda t: {
            "model": "judge", "use_activation": False,
            "messages": [*_turns(t), {"role": "assistant", "content": t.responses[0]}],
        },
        _raw,
        scalar=True,
    ),
    "get_reward": Protocol("/get_reward", 2, _get_reward, _rewards),
    "rm": Protocol("/rm", 2, _rm, _details),
    "verify": Protocol("/verify", 2, _verify, _verified),
    "rollout": Protocol("/v1/rollout", 2, _rollout, _shares),
}  # fmt: skip
