"""Messages of many makers as turns of text: tools, parts, roles; nothing vanishes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from grm_jax.data.preferences import DataError, Preference, parse_row, read_preferences


def said(record: Preference) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in record.turns]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CALL = {"id": "c1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}  # fmt: skip
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"}
SHOWN = '[tool call] weather {"city": "Oslo"}'


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_tool_turns_are_text(content: str | None) -> None:
    messages = [user("Weather?"), {**ASKS, "content": content}, RESULT, user("And?")]
    got = parse_row({"messages": messages, "responses": ["4", "5"], "best": 0})
    call = f"{content}\n{SHOWN}" if content else SHOWN
    assert said(got) == [
        ("user", "Weather?"), ("assistant", call), ("user", "[tool result] 4 degrees"),
        ("user", "And?"),
    ]  # fmt: skip


def test_a_call_is_a_response() -> None:
    got = parse_row({"prompt": [user("Weather?")], "chosen": [{**ASKS, "content": ""}],
                     "rejected": [reply("I do not know")]})  # fmt: skip
    assert got.responses == (SHOWN, "I do not know")
    # Calls are told apart, and an answer after a result keeps what led to it.
    other = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "w", "arguments": {"n": 1}}}],
    }
    got = parse_row({
        "prompt": [user("Weather?")],
        "chosen": [ASKS, RESULT, {**RESULT, "name": "w"}, reply("4")],
        "rejected": [other, RESULT, reply("5")],
    })  # fmt: skip
    assert said(got) == [("user", "Weather?")]
    assert got.responses == (
        f"{SHOWN}\n\n[tool result] 4 degrees\n[tool result: w] 4 degrees\n\n[assistant]\n4",
        '[tool call] w {"n": 1}\n\n[tool result] 4 degrees\n\n[assistant]\n5',
    )
    got = parse_row({"prompt": [user("Weather?")], "chosen": [ASKS, RESULT, reply("4")],
                     "rejected": [reply("5")]})  # fmt: skip
    assert got.responses == (f"{SHOWN}\n\n[tool result] 4 degrees\n\n[assistant]\n4", "5")


def test_a_conversation_may_end_with_a_result() -> None:
    got = parse_row({"messages": [user("Weather?"), ASKS, RESULT], "responses": ["4", "5"],
                     "best": 0})  # fmt: skip
    assert got.turns[-1] == {"role": "user", "content": "[tool result] 4 degrees"}


def test_other_forms_of_calls() -> None:
    sharegpt = [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "w"}'},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "a"},
        {"from": "human", "value": "r"},
    ]  # fmt: skip
    got = parse_row({"conversations": sharegpt, "chosen": "x", "rejected": "y"})
    assert [text for _, text in said(got)] == [
        "q", '[tool call] {"name": "w"}', "[tool result] 4", "a", "r",
    ]  # fmt: skip
    for call, shown in [
        ({"tool_calls": [{"id": "1"}]}, '[tool call] {"id": "1"}'),
        ({"function_call": {"name": "w", "arguments": "{}"}}, "[tool call] w {}"),
        ({"tool_calls": [{"name": "a"}, {"name": "b"}]}, "[tool call] a\n[tool call] b"),
    ]:
        got = parse_row({"prompt": "q", "chosen": [{"role": "assistant", "content": "", **call}],
                         "rejected": [reply("no")]})  # fmt: skip
        assert got.responses[0] == shown


def test_roles_and_parts() -> None:
    got = parse_row({
        "messages": [
            {"role": "developer", "content": "Be brief"},
            {"role": "User", "content": [{"type": "text", "text": "a"}, "b"]},
            {"role": "model", "content": "c"}, user("d"),
        ],
        "responses": ["x", "y"], "best": 0,
    })  # fmt: skip
    assert said(got) == [
        ("system", "Be brief"), ("user", "a\nb"), ("assistant", "c"), ("user", "d"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "messages[0].content[0]: a part of type 'image_url', not text"),
        ({"content": [{"type": "text", "text": None}]}, "messages[0].content[0]: null"),
        ({"content": "a", "images": ["x.png"]}, "messages[0].images: not text"),
        ({"content": None}, "messages[0].content: null"),
        ({"content": {"text": "a"}}, "messages[0].content: dict"),
        ({"content": float("nan")}, "messages[0].content: NaN"),
        ({"content": "a", "tool_calls": [CALL]}, "messages[0]: a tool call of the user"),
        ({"role": "poet", "content": "a"}, "messages[0].role: str 'poet'"),
        ({"role": None, "content": "a"}, "messages[0]: dict"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(message: dict[str, Any], words: str) -> None:
    row = {"messages": [{"role": "user", **message}], "responses": ["x", "y"], "best": 0}
    with pytest.raises(DataError) as error:
        parse_row(row)
    assert str(error.value).startswith(words)


def test_fields_of_messages_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {
        "prompt": [user("q")], "chosen": [reply("a", reasoning_content="r", weight=None)],
        "rejected": [reply("b", tool_calls=[], refusal="")], "tools": [{"type": "function"}],
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        got = read_preferences(jsonl(tmp_path / "a.jsonl", row))
    assert "fields not used: reasoning_content, tools" in caplog.text
    assert got.notes[0].endswith("fields not used: reasoning_content, tools")
