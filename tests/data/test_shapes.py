"""Rows of preference sets as they are published, one of each, and rows that only look like them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grm_jax.data.preferences import DataError, Preference, parse_row, read_preferences

SHARED = Path(__file__).parents[3] / "shared" / "data"


def said(record: Preference) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in record.turns]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------ published rows

HI = [("user", "Hi")]
SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]], list[str], list[float]]] = {
    "HelpSteer2 preference": (
        {
            "split": "train", "prompt": "Hi<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nBye",
            "response_1": "Hello", "response_2": "no", "preference_strength": -2,
            "preference_statement": "@Response 1 is better", "three_most_preferences": [],
        },
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")], ["Hello", "no"], [1, 0],
    ),
    "HelpSteer3": (
        {
            "domain": "code", "language": "python", "context": [user("Hi")],
            "response1": "no", "response2": "Hello", "overall_preference": 3,
            "individual_preference": [{"score": 3, "reasoning": "r"}],
        },
        HI, ["no", "Hello"], [0, 1],
    ),
    "HelpSteer3, equal": (
        {"context": [user("Hi")], "response1": "a", "response2": "b", "overall_preference": 0},
        HI, ["a", "b"], [0.5, 0.5],
    ),
    "SHP": (
        {
            "post_id": "x1", "domain": "askculinary_test", "upvote_ratio": 0.9, "history": "Hi",
            "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 2, "created_at_utc_B": 1,
            "score_A": 4, "score_B": 9, "human_ref_A": "no", "human_ref_B": "Hello", "labels": 0,
            "seconds_difference": 1.0, "score_ratio": 2.25,
        },
        HI, ["no", "Hello"], [0, 1],
    ),
    "SHP, a label in a text": (
        {"history": "Hi", "human_ref_A": "Hello", "human_ref_B": "no", "labels": "1"},
        HI, ["Hello", "no"], [1, 0],
    ),
    "OpenHermesPreferences": (
        {
            "source": "airoboros2.2", "category": "joke", "prompt": "Hi",
            "candidates_completions": ["no", "Hello", "yes"],
            "candidate_policies": ["a", "b", "c"], "ranks": [3, 1, 2], "rank_str": "b>c>a",
            "chosen_policy": "b", "chosen": [user("Hi"), reply("Hello")],
            "rejected_policy": "a", "rejected": [user("Hi"), reply("no")],
        },
        HI, ["no", "Hello", "yes"], [-3, -1, -2],
    ),
    "OpenHermesPreferences, ranks alone": (
        {"prompt": "Hi", "candidates_completions": ["a", "b"], "ranks": [1, 2]},
        HI, ["a", "b"], [-1, -2],
    ),
    "UltraFeedback": (
        {
            "source": "evol_instruct", "instruction": "Hi", "models": ["a", "b"],
            "completions": [
                {
                    "model": "a", "principle": "helpfulness", "custom_system_prompt": "Help.",
                    "response": "Hello", "critique": "Good.", "fine-grained_score": 4.25,
                    "overall_score": 7.5,
                    "annotations": {"helpfulness": {"Rating": "4", "Rationale": "r"}},
                },
                {"model": "b", "response": "no", "fine-grained_score": 5.0, "overall_score": 2.0},
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        },
        HI, ["Hello", "no"], [7.5, 2.0],
    ),
    "UltraFeedback, scores as text": (
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "overall_score": "8.5"}, {"response": "b", "overall_score": "2"},
            ],
        },
        HI, ["a", "b"], [8.5, 2],
    ),
    "UltraFeedback, a score missing": (
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "overall_score": 8.5, "fine-grained_score": 4},
                {"response": "b", "overall_score": None, "fine-grained_score": 2},
            ],
        },
        HI, ["a", "b"], [4, 2],
    ),
    "UltraFeedback, ratings alone": (
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "annotations": {"x": {"Rating": "4"}, "y": {"Rating": "5"}}},
                {"response": "b", "annotations": {"x": {"Rating": "1"}, "y": {"Rating": "2"}}},
            ],
        },
        HI, ["a", "b"], [4.5, 1.5],
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "Hi", "prompt_id": "ab12", "messages": [user("Hi"), reply("Hello")],
            "chosen": [user("Hi"), reply("Hello")], "rejected": [user("Hi"), reply("no")],
            "score_chosen": 8.5, "score_rejected": 3.0,
        },
        HI, ["Hello", "no"], [8.5, 3.0],
    ),
    "Skywork": (
        {
            "chosen": [user("Hi"), reply("Yes?"), user("Bye"), reply("Good bye")],
            "rejected": [user("Hi"), reply("Yes?"), user("Bye"), reply("no")],
            "source": "offsetbias",
        },
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")], ["Good bye", "no"], [1, 0],
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: ",
            "answers": [
                {"answer": "Good bye", "model": "a", "rank": 1.0},
                {"answer": "no", "model": "b", "rank": 3.0},
                {"answer": "Bye", "model": "c", "rank": 2.0},
            ],
            "turns": 2, "num_responses": 3, "source": ["lmsys-chat-1m"], "good_natured": True,
        },
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")], ["Good bye", "no", "Bye"],
        [-1, -3, -2],
    ),
    "arena": (
        {
            "question_id": "x", "model_a": "a", "model_b": "b", "winner": "model_b", "turn": 1,
            "conversation_a": [user("Hi"), reply("no")],
            "conversation_b": [user("Hi"), reply("Hello")],
        },
        HI, ["no", "Hello"], [0, 1],
    ),
    "arena, two turns": (
        {
            "winner": "model_a",
            "conversation_a": [user("Hi"), reply("Hello"), user("Bye"), reply("Good bye")],
            "conversation_b": [user("Hi"), reply("no"), user("Bye"), reply("no")],
        },
        HI,
        ["Hello\n\n[user]\nBye\n\n[assistant]\nGood bye", "no\n\n[user]\nBye\n\n[assistant]\nno"],
        [1, 0],
    ),
    "arena, both bad, in parts": (
        {
            "winner": "both_bad",
            "conversation_a": [
                {"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}]},
                reply("a"),
            ],
            "conversation_b": [user("Hi"), reply("b")],
        },
        HI, ["a", "b"], [0.5, 0.5],
    ),
    "arena 55k": (
        {
            "id": 30192, "model_a": "a", "model_b": "b", "prompt": '["Hi"]',
            "response_a": '["Hello"]', "response_b": '["no"]',
            "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
        },
        HI, ["Hello", "no"], [1, 0],
    ),
    "arena 55k, a tie, two turns": (
        {
            "prompt": '["Hi", "Bye"]', "response_a": '["a", "b"]', "response_b": '["a", "c"]',
            "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1,
        },
        [("user", "Hi"), ("assistant", "a"), ("user", "Bye")], ["b", "c"], [0.5, 0.5],
    ),
    "arena, plain texts": (
        {"prompt": "Hi", "response_a": "[1] Hello", "response_b": "no", "winner": "model_a"},
        HI, ["[1] Hello", "no"], [1, 0],
    ),
    "Orca DPO": (
        {"system": "Be brief", "question": "Hi", "chosen": "Hello", "rejected": "no"},
        [("system", "Be brief"), ("user", "Hi")], ["Hello", "no"], [1, 0],
    ),
    "Orca DPO, empty system": (
        {"system": "", "question": "Hi", "chosen": "Hello", "rejected": "no"},
        HI, ["Hello", "no"], [1, 0],
    ),
    "Orca DPO as distilabel writes it": (
        {"system": "", "input": "Hi", "chosen": "Hello", "rejected": "no", "rating": [9, 3]},
        HI, ["Hello", "no"], [1, 0],
    ),
    "Alpaca DPO": (
        {
            "instruction": "Translate", "input": "Hallo", "chosen": "Hello", "rejected": "no",
            "system": "Be brief", "history": [["Hi", "Yes?"]],
        },
        [
            ("system", "Be brief"), ("user", "Hi"), ("assistant", "Yes?"),
            ("user", "Translate\nHallo"),
        ],
        ["Hello", "no"], [1, 0],
    ),
    "Alpaca DPO, older": (
        {"instruction": "Hi", "input": "", "output": ["Hello", "no"]}, HI, ["Hello", "no"], [1, 0],
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief"}, {"from": "human", "value": "Hi"},
            ],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        [("system", "Be brief"), ("user", "Hi")], ["Hello", "no"], [1, 0],
    ),
    "RewardBench 2": (
        {
            "id": "12", "prompt": "Hi", "chosen": ["Hello", "Hey"], "rejected": ["no", "nein"],
            "num_correct": 2, "num_incorrect": 2, "total_completions": 4, "models": ["m"] * 4,
            "subset": "Ties", "additional_metadata": None,
        },
        HI, ["Hello", "Hey", "no", "nein"], [1, 1, 0, 0],
    ),
    "one chosen text, several rejected": (
        {"prompt": "Hi", "chosen": "Hello", "rejected": ["no", "nein"]},
        HI, ["Hello", "no", "nein"], [1, 0, 0],
    ),
    "KTO": ({"prompt": "Hi", "completion": "Hello", "label": True}, HI, ["Hello"], [1]),
    "HH prompt beside its replies": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "no"},
        HI, ["Hello", "no"], [1, 0],
    ),
    "a system turn of the replies' own": (
        {
            "prompt": "Hi",
            "chosen": [{"role": "system", "content": "Be brief"}, user("Hi"), reply("Hello")],
            "rejected": [{"role": "system", "content": "Be brief"}, user("Hi"), reply("no")],
        },
        [("system", "Be brief"), ("user", "Hi")], ["Hello", "no"], [1, 0],
    ),
    "a prompt that is the last question": (
        {
            "prompt": "Bye",
            "chosen": [user("Hi"), reply("Yes?"), user("Bye"), reply("Hello")],
            "rejected": [user("Hi"), reply("Yes?"), user("Bye"), reply("no")],
        },
        [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")], ["Hello", "no"], [1, 0],
    ),
    "numbers and lists in texts": (
        {"query": "Hi", "responses": '["a", "b"]', "labels": ["8.5", " -7 "]},
        HI, ["a", "b"], [8.5, -7],
    ),
    "booleans": ({"query": "Hi", "responses": ["a", "b"], "labels": [True, False]},
                 HI, ["a", "b"], [1, 0]),
    "best in a text": ({"query": "Hi", "responses": ["a", "b"], "best": "1"},
                       HI, ["a", "b"], [0, 1]),
    "best as a float": ({"query": "Hi", "responses": ["a", "b"], "best": 1.0},
                        HI, ["a", "b"], [0, 1]),
    "a label in a text": ({"query": "Hi", "response": "a", "label": "1"}, HI, ["a"], [1]),
    "a label of a CSV file": ({"query": "Hi", "response": "a", "label": "False"}, HI, ["a"], [0]),
    "identical responses of one label": (
        {"query": "Hi", "responses": ["a", "a", "b"], "labels": [2, 2, 1]},
        HI, ["a", "a", "b"], [2, 2, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_published_rows(name: str) -> None:
    row, turns, responses, labels = SHAPES[name]
    got = parse_row(row)
    assert said(got) == turns
    assert list(got.responses) == responses
    assert list(got.labels) == labels and all(type(label) is float for label in got.labels)


def test_ids_that_are_numbers() -> None:
    row = {"query": "Hi", "responses": ["a", "b"], "best": 0}
    assert [parse_row({**row, "id": one}).id for one in (12, 12.0, "12")] == ["12"] * 3
    for bad in (12.5, float("nan"), True):
        with pytest.raises(DataError, match=r"^id: "):
            parse_row({**row, "id": bad})


# ------------------------------------------------------------------------------ HelpSteer's ratings


def rated(prompt: str, response: str, helpfulness: Any) -> dict[str, Any]:
    return {
        "prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4,
        "coherence": 4, "complexity": 2, "verbosity": 1,
    }  # fmt: skip


def test_rated_responses_of_one_prompt_are_one_record(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "train.jsonl",
        rated("p", "a", 4), rated("p", "b", 2),
        rated("q", "c", 0), rated("q", "d", "3"), rated("q", "e", 3),
        rated("p", "a", 4), rated("p", "b", 2),
    )  # fmt: skip
    got = read_preferences(path)
    assert [(r.query, r.responses, r.labels) for r in got] == [
        ("p", ("a", "b"), (4, 2)),
        ("q", ("c", "d", "e"), (0, 3, 3)),
        ("p", ("a", "b"), (4, 2)),
    ]
    assert [r.source for r in got] == [f"{path}:{line}" for line in (1, 3, 6)]
    assert got[2].id == f"{got[0].id}-2"
    assert got.notes == (f"{path}: fields not used: coherence, complexity, correctness, verbosity",)


def test_ratings_of_several_annotators_are_their_mean(tmp_path: Path) -> None:
    """HelpSteer 2 publishes them as its disagreements."""
    path = jsonl(
        tmp_path / "disagreements.jsonl",
        rated("p", "a", [4, 3, 3]), rated("p", "b", [0, 4]), rated("q", "c", "[1, 2]"),
        rated("q", "d", 3),
    )  # fmt: skip
    assert [record.labels for record in read_preferences(path)] == [(10 / 3, 2.0), (1.5, 3.0)]
    for bad, words in (([], "an empty list"), ([4, "N/A"], r"helpfulness\[1\]: str 'N/A'")):
        with pytest.raises(DataError, match=words):
            read_preferences(
                jsonl(tmp_path / "bad.jsonl", rated("p", "a", bad), rated("p", "b", 1))
            )


def test_rated_responses_that_can_not_be_compared(tmp_path: Path) -> None:
    rows = [
        rated("lone", "a", 4),
        rated("same", "b", 4), rated("same", "b", 1),
        rated("p", "a", 4), rated("p", "x", "N/A"), rated("p", "y", None), rated("p", "b", 2),
    ]  # fmt: skip
    path = jsonl(tmp_path / "train.jsonl", *rows)
    with pytest.raises(DataError, match=r"jsonl:1: helpfulness: one rated response.*--skip-bad"):
        read_preferences(path)
    got = read_preferences(path, skip_bad_rows=True)
    assert [(r.query, r.labels) for r in got] == [("p", (4, 2))]
    expected = (
        ":1: helpfulness: one rated", ":2: responses: responses 0 and 1 (from 0) are identical",
        ":5: helpfulness: str 'N/A'", ":6: helpfulness: null",
    )  # fmt: skip
    assert len(got.skipped) == 4
    for message, words in zip(got.skipped, expected, strict=True):
        assert words in message
    with pytest.raises(
        DataError, match=r"5 of 7 rows are bad, more than 70%.*larger --max-bad-share"
    ):
        read_preferences(path, skip_bad_rows=True, max_bad_share=0.7)
    with pytest.raises(DataError, match="no other to compare it with"):
        parse_row(rows[0])


def test_ties_are_not_counted_as_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tie = {"query": "q", "responses": ["a", "b"], "labels": [1, 1]}
    rows = [tie, tie, tie, {"query": "q"}, *({**tie, "labels": [i, -1]} for i in range(6))]
    path = jsonl(tmp_path / "d.jsonl", *rows)
    options = {"skip_bad_rows": True, "unique_best": True}
    got = read_preferences(path, **options, max_bad_share=0.1)
    assert (len(got), len(got.skipped), got.tied) == (6, 4, 3)
    assert f"1 bad rows left out; the first: {path}:4: responses: " in caplog.text
    assert "3 records left out that have no unique best response" in caplog.text
    with pytest.raises(DataError, match=r"1 of 10 rows are bad, more than 5%; .*jsonl:4: resp"):
        read_preferences(path, **options, max_bad_share=0.05)
    assert len(read_preferences(path, skip_bad_rows=True)) == 9  # they are legal elsewhere


def test_groups_do_not_reach_over_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", rated("p", f"{name}1", 4), rated("p", f"{name}2", 2))
    assert [r.responses for r in read_preferences(tmp_path)] == [("a1", "a2"), ("b1", "b2")]


# ------------------------------------------------------------------------------ refused rows

PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "no"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    # What they say of quality is not readable, or contradicts itself.
    ({**PAIR, "score_chosen": 1, "score_rejected": 2}, "score_chosen: 1, below score_rejected 2"),
    ({**PAIR, "score_chosen": "N/A", "score_rejected": 2}, "score_chosen: str 'N/A'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["N/A", 7]}, "labels[0]: str 'N/A'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["high", 7]}, "labels[0]: str 'high'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["nan", 7]}, "labels[0]: str 'nan'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["8/10", 7]}, "labels[0]: str '8/10'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["٨", 7]}, "labels[0]: str '٨'"),
    ({"query": "q", "responses": ["a", "b"], "labels": ["1e999", 7]}, "labels[0]: Infinity"),
    ({"query": "q", "responses": ["a", "b"], "labels": [float("nan"), 7]}, "labels[0]: NaN"),
    ({"query": "q", "responses": ["a", "b"], "best": "first"}, "best: str 'first'"),
    ({"query": "q", "responses": ["a", "b"], "best": 0.5}, "best: float 0.5"),
    ({"query": "q", "response": "a", "label": "2"}, "label: str '2'"),
    ({"context": [user("Hi")], "response1": "a", "response2": "b", "overall_preference": None},
     "overall_preference: null"),
    ({"prompt": "Hi", "response_1": "a", "response_2": None, "preference_strength": 1},
     "response_2: null"),
    ({"instruction": "Hi", "completions": []}, "completions: an empty list"),
    ({"instruction": "Hi", "completions": ["a", "b"]}, "completions[0]: str 'a'"),
    ({"instruction": "Hi", "completions": [{"response": "a", "overall_score": "N/A"}] * 2},
     "completions[0].overall_score: str 'N/A'"),
    ({"instruction": "Hi", "completions": [{"response": "a"}] * 2},
     "completions[0].overall_score: null"),
    ({"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
     "answers[1].rank: null"),
    ({"prompt": "Hi", "answers": [{"answer": None, "rank": 1}]}, "answers[0].answer: null"),
    ({"conversation_a": [user("Hi"), reply("a")], "conversation_b": [user("Hi"), reply("b")]},
     "winner: missing"),
    ({"conversation_a": [user("Hi"), reply("a")], "conversation_b": [user("Hi"), reply("b")],
      "winner": "gpt-4"}, "winner: str 'gpt-4'"),
    ({"conversation_a": [user("Hi"), reply("a")], "conversation_b": [user("Ho"), reply("b")],
      "winner": "tie"}, "conversation_b: other questions"),
    ({"prompt": '["Hi"]', "response_a": "[null]", "response_b": '["b"]', "winner_model_a": 1},
     "response_a[0]: null"),
    ({"prompt": '["Hi"]', "response_a": '["a", "b"]', "response_b": '["b"]', "winner_tie": 1},
     "response_a: 2 turns where the prompt has 1"),
    ({"prompt": "Hi", "response_a": "a", "response_b": "b", "winner_model_a": 1, "winner_tie": 1},
     "winner_model_a: votes"),
    ({"instruction": "Hi", "output": "Hello"}, "output: str 'Hello'"),
    ({"instruction": "Hi", "output": ["a", "b", "c"]}, "output: 3 texts"),
    ({"prompt": "Hi", "chosen": ["a"], "rejected": []}, "rejected: an empty list"),
    ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", None]}, "rejected[1]: null"),
    ({"chosen": ["a"], "rejected": ["b"]}, "query: missing"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "rejected: null"),
    ({"prompt": "Hi", "chosen": float("nan"), "rejected": "b"},
     "chosen: chosen is NaN, rejected is str"),
    ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels: int 2"),
    ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b"}, "labels: missing"),
    ({"human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "history: missing"),
    ({"prompt": "Hi", "candidates_completions": ["a", "b"], "ranks": [1]},
     "ranks: 1 for 2 candidates"),
    ({"prompt": "Hi", "candidates_completions": ["a", "b"], "ranks": [1, None]}, "ranks[1]: null"),
    ({"prompt": "Hi", "candidates_completions": ["a", "b"]}, "ranks: missing"),
    # Ranks that count the best one highest.
    ({**PAIR, "candidates_completions": ["Hello", "no"], "ranks": [2, 1]},
     "ranks: the lowest is not that of 'chosen'"),
    # Other than one conversation.
    ({**PAIR, "system": "a", "system_prompt": "b"}, "system_prompt: given together with 'system'"),
    ({**PAIR, "prompt": [{"role": "system", "content": "a"}, user("Hi")], "system": "b"},
     "system: given together with another system turn"),
    ({**PAIR, "question": "Ho"}, "question: given together with 'prompt'"),
    ({**PAIR, "system": 3}, "system: int 3"),
    ({**PAIR, "images": ["a.png"]}, "images: not text"),
    ({"instruction": "Hi", "chosen": "a", "rejected": "b", "history": [["x"]]}, "history[0]: list"),
    ({"chosen": [user("Hi"), reply("a"), user("Why?"), reply("b")],
      "rejected": [user("Hi"), reply("c"), user("How?"), reply("d")]},
     "rejected: the conversation before the last reply"),
    # Unknown shapes say which are known, and what was found.
    ({"text": "Hi", "stars": 4}, "responses: no known shape; the row has ['stars', 'text']"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_rows_that_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as error:
        parse_row(row)
    assert str(error.value).startswith(words)


def test_an_unknown_shape_names_those_that_are_known() -> None:
    with pytest.raises(DataError) as error:
        parse_row({"text": "Hi"})
    for name in ("responses", "chosen", "HelpSteer", "UltraFeedback", "Nectar", "arena", "Alpaca"):
        assert name in str(error.value)


SAME: dict[str, dict[str, Any]] = {
    "pair": {"prompt": "Hi", "chosen": "a", "rejected": "a"},
    "list": {"query": "Hi", "responses": ["a", "b", "a"], "labels": [1, 2, 3]},
    "best": {"query": "Hi", "responses": ["a", "a"], "best": 0},
    "messages": {"prompt": "Hi", "chosen": [reply("a")], "rejected": [reply("a")]},
    "conversations": {"chosen": [user("Hi"), reply("a")], "rejected": [user("Hi"), reply("a")]},
    "HH": {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: a "},
    "lists": {"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["b", "c"]},
    "HelpSteer3": {"context": [user("Hi")], "response1": "a", "response2": "a",
                   "overall_preference": 1},
    "arena": {"conversation_a": [user("Hi"), reply("a")], "winner": "model_a",
              "conversation_b": [user("Hi"), reply("a")]},
    "Nectar": {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "a", "rank": 2}]},
    "parts": {"prompt": "Hi", "chosen": [reply("a")],
              "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SAME)
def test_identical_responses_of_different_labels_are_a_bad_row(shape: str) -> None:
    with pytest.raises(DataError, match=r"^responses: responses . and . .*are identical"):
        parse_row(SAME[shape])


# ------------------------------------------------------------------------------ real files


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here (real data beside the repository)")
    return path


def test_helpsteer_is_read() -> None:
    path = real("helpsteer1_sample/nvidia_HelpSteer_sample.jsonl")
    got = read_preferences(path, skip_bad_rows=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    # 139 prompts; 9 have one response alone, 2 the same response with two ratings.
    assert len(got) == 128 and len(got.skipped) == 11
    ratings = {(row["prompt"], row["response"]): row["helpfulness"] for row in rows}
    for record in got:
        assert len(record.responses) > 1
        for response, label in zip(record.responses, record.labels, strict=True):
            assert ratings[record.query, response] == label


def test_arena_votes_are_read() -> None:
    path = real("arena55k_sample/lmsys_lmsys-arena-human-preference-55k_sample.jsonl")
    got = read_preferences(path, skip_bad_rows=True)
    rows = {json.loads(line)["id"]: json.loads(line) for line in path.open(encoding="utf-8")}
    for message in got.skipped:
        assert "identical" in message or "null" in message
    assert len(got) + len(got.skipped) == len(rows) == 500 and len(got.skipped) < 8
    for record in got:
        row = rows[int(record.id)]
        won = {(1.0, 0.0): "winner_model_a", (0.0, 1.0): "winner_model_b"}
        assert row[won.get(record.labels, "winner_tie")] == 1
        # Not a word of the vote is lost.
        shown = "".join([*(text for _, text in said(record)), *record.responses])
        for name in ("prompt", "response_a", "response_b"):
            assert all(text in shown for text in json.loads(row[name]))
