"""Every reader: its own rows, and what it says of bad ones."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from grm_jax.benchmarks import get_benchmark
from grm_jax.data.rows import DataError
from grm_jax.scoring.rules import Rules


def _ppe(number: int) -> dict[str, Any]:
    return {
        "question_id": f"q{number}",
        "prompt": "p",
        "model_name": "m",
        **{f"response_{i + 1}": f"r{i}" for i in range(4)},
        "scores": [True, False, True, False],
        "sampled_conflict_pairs": [[0, 1], [3, 2]],
    }


def _bon(number: int) -> dict[str, Any]:
    return {
        "bon_uid": f"b{number}",
        "conversation_input": [{"role": "user", "content": "p"}],
        "bon_best": {"llm_name": "x", "answer": "good"},
        "loser_list": [{"answer": "bad"}, {"answer": "worse"}],
        "category_path": "",
    }


GRADING = "###The instruction to evaluate:\n{}\n\n###Response to evaluate:\n{}\n\n###Rubric"
# Benchmark -> (file below the folder, a good row for a number).
GOOD: dict[str, tuple[str, Any]] = {
    "rewardbench": (
        "filtered.jsonl",
        lambda n: {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": n},
    ),
    "rewardbench2": (
        "test.jsonl",
        lambda n: {
            "id": str(n), "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"],
            "num_correct": 1, "subset": "Math",
        },
    ),
    "ppe-preference": (
        "votes.jsonl",
        lambda n: {
            "question_id": f"v{n}", "model_a": "x", "model_b": "y", "winner": "x", "prompt": "p",
            "response_1": "a", "response_2": "b", "language": "English",
        },
    ),
    "ppe-correctness": ("PPE-MATH-Best-of-K/train.jsonl", _ppe),
    "rmb": ("BoN_set/Helpfulness/a.jsonl", _bon),
    "rm-bench": (
        "chat_filtered.jsonl",
        lambda n: {"id": n, "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]},
    ),
    "judgebench": (
        "pairs.jsonl",
        lambda n: {
            "pair_id": f"j{n}", "source": "mmlu-pro-law", "question": "q", "response_A": "a",
            "response_B": "b", "label": "A>B",
        },
    ),
    "llmbar": (
        "Natural/dataset.json",
        lambda n: {"input": f"i{n}", "output_1": "a", "output_2": "b", "label": 2},
    ),
    "pandalm": (
        "testset-v1.json",
        lambda n: {
            "idx": n, "instruction": "i", "input": "", "response1": "a", "response2": "b",
            "annotator1": 1, "annotator2": 1, "annotator3": 0,
        },
    ),
    "hhh": (
        "hhh_alignment_eval.json",
        lambda n: {
            "source": "honest",
            "chosen_instruction": GRADING.format(f"q{n}", "a"),
            "rejected_instruction": GRADING.format(f"q{n}", "b"),
        },
    ),
    "realmistake": (
        "data.zip",
        lambda n: {
            "input": "i", "llm_response": "r", "error_label": "error",
            "metadata": {"id": f"m{n}", "llm_response_model": "meta/llama"},
        },
    ),
    "preferences": (
        "mine.jsonl",
        lambda n: {"id": f"p{n}", "prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "synthetic": (
        "heldout.jsonl",
        lambda n: {
            "id": f"s{n}", "query": "p", "responses": ["a", "b"], "labels": [1, 0],
            "domain": "fresh",
        },
    ),
}  # fmt: skip

DELETE = object()
# Benchmark -> corruptions of a row: {path of a field: value}, and the field that is named.
FIELDS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "rewardbench": [
        ({"chosen": DELETE}, "chosen"), ({"prompt": 3}, "prompt"), ({"rejected": 5}, "rejected"),
        ({"subset": "hep-basic"}, "subset"), ({"id": 2.5}, "id"), ({"id": DELETE}, "id"),
    ],
    "rewardbench2": [
        ({"chosen": DELETE}, "chosen"), ({"rejected": "x\ud83d"}, "rejected[0]"),
        ({"rejected": [None]}, "rejected[0]"), ({"subset": "Chat"}, "subset"),
        ({"num_correct": 2}, "num_correct"), ({"chosen": ["a", "b"]}, "chosen"),
        ({"subset": "Ties", "id": "7"}, "id"),
    ],
    "ppe-preference": [
        ({"prompt": DELETE}, "prompt"), ({"response_1": 4}, "response_1"),
        ({"winner": "z"}, "winner"), ({"prompt": ["p"]}, "prompt"),
        ({"question_id": None}, "question_id"), ({"response_2": DELETE}, "response_2"),
    ],
    "ppe-correctness": [
        ({"scores": DELETE}, "scores"), ({"scores": [1, 0, 1, 0]}, "scores"),
        ({"scores": [True]}, "scores"), ({"prompt": 0}, "prompt"),
        ({"sampled_conflict_pairs": [[0, 4]]}, "sampled_conflict_pairs"),
        ({"sampled_conflict_pairs": [[0, 2]]}, "sampled_conflict_pairs[0]"),
        ({"response_2": 1}, "response_2"),
    ],
    "rmb": [
        ({"bon_best": DELETE}, "bon_best"), ({"loser_list": []}, "loser_list"),
        ({"loser_list": [{"answer": 3}]}, "loser_list[0].answer"),
        ({"bon_best": {}}, "bon_best.answer"), ({"conversation_input": "p"}, "conversation_input"),
        ({"conversation_input": [{"role": "cat", "content": "p"}]}, "conversation_input"),
    ],
    "rm-bench": [
        ({"chosen": ["a", "b"]}, "chosen"), ({"rejected": DELETE}, "rejected"),
        ({"prompt": ["p"]}, "prompt"), ({"chosen": ["a", 2, "c"]}, "chosen[1]"),
        ({"id": DELETE}, "id"), ({"domain": "music"}, "domain"),
    ],
    "judgebench": [
        ({"label": "A=B"}, "label"), ({"label": DELETE}, "label"),
        ({"response_A": None}, "response_A"), ({"source": "trivia"}, "source"),
        ({"question": 5}, "question"),
        ({"pair_id": DELETE}, "pair_id"),
    ],
    "llmbar": [
        ({"label": 3}, "label"), ({"label": True}, "label"), ({"output_1": None}, "output_1"),
        ({"input": DELETE}, "input"), ({"output_2": ["b"]}, "output_2"), ({"label": "1"}, "label"),
    ],
    "pandalm": [
        ({"annotator2": 3}, "annotator2"), ({"annotator1": DELETE}, "annotator1"),
        ({"annotator1": 2}, "annotator1"), ({"response1": 7}, "response1"),
        ({"instruction": ""}, "instruction"), ({"response2": DELETE}, "response2"),
    ],
    "hhh": [
        ({"source": "kind"}, "source"), ({"chosen_instruction": "text"}, "chosen_instruction"),
        ({"rejected_instruction": DELETE}, "rejected_instruction"),
        ({"rejected_instruction": GRADING.format("other", "b")}, "rejected_instruction"),
        ({"chosen_instruction": GRADING.format(" ", "a")}, "chosen_instruction"),
        ({"source": DELETE}, "source"),
    ],
    "realmistake": [
        ({"error_label": "maybe"}, "error_label"), ({"error_label": DELETE}, "error_label"),
        ({"llm_response": None}, "llm_response"), ({"input": 3}, "input"),
        ({"metadata": DELETE}, "metadata"),
        ({"metadata": {"id": "x"}}, "metadata.llm_response_model"),
    ],
    "preferences": [
        ({"chosen": DELETE}, "chosen"), ({"rejected": 3}, "chosen"), ({"prompt": ""}, "prompt"),
        ({"labels": [1, 0]}, "labels"), ({"id": [3]}, "id"), ({"prompt": DELETE}, "chosen"),
    ],
    "synthetic": [
        ({"labels": [1, 1]}, "labels"), ({"labels": DELETE}, "labels"),
        ({"responses": []}, "responses"), ({"query": ""}, "query"), ({"labels": [1]}, "labels"),
        ({"responses": ["a", 3]}, "responses[1]"),
    ],
}  # fmt: skip
NO_IDS = ("llmbar", "hhh")  # rows are told apart by their place


def write(folder: Path, bench: str, lines: list[bytes]) -> Path:
    """The benchmark's file with these rows, as its authors keep it."""
    file = folder / GOOD[bench][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".zip":
        # Without a password: reading with one is tested on the real file.
        blob = io.BytesIO()
        with zipfile.ZipFile(blob, "w") as archive:
            name = "data/answerability_classification/m.jsonl"
            archive.writestr(name, b"\n".join(lines) + b"\n")
        file.write_bytes(blob.getvalue())
    elif file.suffix == ".json":
        file.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")
    else:
        file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def rows(bench: str, count: int = 3) -> list[dict[str, Any]]:
    return [GOOD[bench][1](number) for number in range(count)]


def lines(values: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def load(bench: str, path: Path, **more):
    return get_benchmark(bench).load(path, **more)


@pytest.mark.parametrize("bench", GOOD)
def test_good_rows_are_read(bench, tmp_path):
    write(tmp_path, bench, lines(rows(bench)))
    found = load(bench, tmp_path)
    assert len({record.id for record in found}) == len(found) >= 3
    assert found.skipped == ()
    assert all(record.source for record in found)


# Fields of a prompt and of a response; models that answered nothing are part of a benchmark.
SAID: dict[str, tuple[str, str]] = {
    "rewardbench": ("prompt", "rejected"), "rewardbench2": ("prompt", "rejected"),
    "ppe-preference": ("prompt", "response_1"), "ppe-correctness": ("prompt", "response_2"),
    "rm-bench": ("prompt", "chosen"), "judgebench": ("question", "response_B"),
    "llmbar": ("input", "output_2"), "pandalm": ("input", "response1"),
    "realmistake": ("input", "llm_response"),
}  # fmt: skip


@pytest.mark.parametrize("bench", SAID)
def test_empty_prompts_and_responses_are_read_as_published(bench, tmp_path):
    values = rows(bench)
    for field in SAID[bench]:
        if isinstance(values[1][field], list):
            values[1][field][0] = ""
        else:
            values[1][field] = "" if field != "output_2" else " "
    write(tmp_path, bench, lines(values))
    found = load(bench, tmp_path)
    assert found.skipped == ()
    texts = [text.strip() for record in found for text in record.responses]
    assert "" in texts
    if bench != "pandalm":  # an instruction with or without input
        assert any(not record.query.strip() for record in found)


@pytest.mark.parametrize(
    ("bench", "change", "field"),
    [(bench, change, field) for bench, table in FIELDS.items() for change, field in table],
)
def test_a_bad_field_is_named_or_its_row_left_out(bench, change, field, tmp_path):
    values = rows(bench)
    bad = copy.deepcopy(values[1])
    for name, value in change.items():
        if value is DELETE:
            del bad[name]
        else:
            bad[name] = value
    file = write(tmp_path, bench, lines([values[0], bad, values[2]]))
    with pytest.raises(DataError) as error:
        load(bench, tmp_path)
    message = str(error.value)
    assert str(file) in message and "; fix: " in message
    assert any(place in message for place in (":2: ", ":2 ", "row 2: "))
    assert error.value.field.startswith(field)
    found = load(bench, tmp_path, skip_bad_rows=True)
    assert len(found.skipped) == 1 and field.split("[")[0] in found.skipped[0]
    # What is left is what the two good rows alone give.
    assert [r.responses for r in found] == [r.responses for r in _alone(bench, values, tmp_path)]


def _alone(bench, values, folder):
    write(folder, bench, lines([values[0], values[2]]))
    return load(bench, folder)


@pytest.mark.parametrize("bench", GOOD)
@pytest.mark.parametrize("how", ["cut off", "not UTF-8", "not JSON", "a list", "empty", "twice"])
def test_a_bad_file_is_named(bench, how, tmp_path):
    good = lines(rows(bench))
    if how == "twice" and bench in NO_IDS:
        pytest.skip("rows of this benchmark have no ids")
    bad = {
        "cut off": good[1][:-9],
        "not UTF-8": good[1][:-2] + b"\xff" + good[1][-2:],
        "not JSON": b"{'id': 1}",
        "a list": b"[1, 2]",
        "twice": good[0],
    }
    content = [] if how == "empty" else [good[0], bad[how], good[2]]
    file = write(tmp_path, bench, content)
    if how == "empty" and file.suffix == ".json":
        file.write_bytes(b"")
    with pytest.raises(DataError) as error:
        load(bench, tmp_path)
    assert str(tmp_path) in str(error.value) and "; fix: " in str(error.value)
    whole = file.suffix == ".json" and how not in ("a list", "twice")  # one text: no row is sound
    if how == "empty" or whole:
        with pytest.raises(DataError):
            load(bench, tmp_path, skip_bad_rows=True)
    else:
        found = load(bench, tmp_path, skip_bad_rows=True)
        assert len(found.skipped) == 1 and len(found) >= 2


@pytest.mark.parametrize(
    "bench", [name for name in GOOD if name not in ("preferences", "synthetic")]
)
def test_a_missing_file_says_what_to_download(bench, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"fix: (download|clone) "):
            load(bench, path)


def test_forms_and_orders(tmp_path):
    write(tmp_path, "rmb", lines(rows("rmb")))
    assert [r.id for r in load("rmb", tmp_path)][:2] == ["Help-BoN/b0/0", "Help-BoN/b0/1"]
    (first, *_) = load("rmb", tmp_path, rules=Rules(form="list"))
    assert first.responses == ("good", "bad", "worse") and first.labels == (1, 0, 0)
    both = load("rmb", tmp_path, rules=Rules(form="pairs", order="both"))
    assert len(both) == 12
    assert both[1].id == "Help-BoN/b0/0#swapped"
    assert both[1].responses == both[0].responses[::-1] and both[1].labels == (0, 1)
    with pytest.raises(ValueError, match="order 'both' needs pairs"):
        load("rmb", tmp_path, rules=Rules(form="list", order="both"))
    with pytest.raises(ValueError, match="rmb has no form 'single'; give one of pairs, list"):
        load("rmb", tmp_path, rules=Rules(form="single"))
    # A limit takes whole items.
    kept = load("rmb", tmp_path, limit=2)
    assert len(kept) == 4 and len({record.item for record in kept}) == 2


def test_arena_turns_are_read(tmp_path):
    rows = [
        {
            "id": 1, "model_a": "x", "model_b": "y",
            "prompt": '["one", "two"]', "response_a": '["a1", "a2"]', "response_b": '["b1", null]',
            "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
        },
        {
            "id": 2, "model_a": "x", "model_b": "y", "prompt": '["q"]', "response_a": '["a"]',
            "response_b": '["b"]', "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1,
        },
    ]  # fmt: skip
    (tmp_path / "arena.jsonl").write_bytes(b"\n".join(lines(rows)))
    (record,) = found = load("ppe-preference", tmp_path / "arena.jsonl")
    assert record.query == "one" and record.labels == (0, 1)
    assert record.responses == (
        "a1\n\nUser: two\n\nAssistant: a2",
        "b1\n\nUser: two\n\nAssistant: ",
    )
    assert found.notes[0] == "1 human ties are not counted, as in the official metric"


def test_prompts_may_look_like_json(tmp_path):
    _, row = GOOD["ppe-preference"]
    prompts = ("[1, 2, 3] sort this", "[INST] hi")
    values = [{**row(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
    (tmp_path / "votes.jsonl").write_bytes(b"\n".join(lines(values)))
    assert [r.query for r in load("ppe-preference", tmp_path)] == list(prompts)


def test_all_of_ppe_in_one_folder(tmp_path):
    """The nearest name says which set it is, and votes are not among the correct answers."""
    above = tmp_path / "mathias"
    for name in ("PPE-GPQA-Best-of-K", "PPE-MBPP-Plus-Best-of-K"):
        (above / name).mkdir(parents=True)
        (above / name / "train.jsonl").write_bytes(b"\n".join(lines([_ppe(0)])))
    votes = above / "PPE-Human-Preference-V1" / "test.jsonl"
    votes.parent.mkdir()
    votes.write_bytes(b"\n".join(lines([GOOD["ppe-preference"][1](0)])))
    assert {r.domain for r in load("ppe-correctness", above)} == {"GPQA", "MBPP-Plus"}
    assert [r.id for r in load("ppe-preference", above)] == ["v0"]
    alone = tmp_path / "train.jsonl"
    alone.write_bytes(b"\n".join(lines([_ppe(0)])))
    with pytest.raises(DataError, match="its path names no data set"):
        load("ppe-correctness", alone)


def test_big_benchs_own_task_file(tmp_path):
    folder = tmp_path / "data" / "harmless"
    folder.mkdir(parents=True)
    task = {"examples": [
        {"input": "q", "target_scores": {"good": 1, "bad": 0}},
        {"input": "Human: a\n\nAssistant: b\n\nHuman: c", "target_scores": {"x": 0, "y": 1}},
    ]}  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task))
    first, second = load("hhh", tmp_path)
    assert (first.domain, first.responses, first.labels) == ("harmless", ("good", "bad"), (1, 0))
    assert [turn["role"] for turn in second.turns] == ["user", "assistant", "user"]
    assert second.query == "c" and second.labels == (0, 1)
    (folder / "task.json").write_text('{"examples": {}}')
    with pytest.raises(DataError, match=r"task\.json: examples: no list of objects"):
        load("hhh", tmp_path)


def test_sampled_pairs_are_asked_once(tmp_path):
    row = {**_ppe(0), "sampled_conflict_pairs": [[0, 1], [1, 0], [3, 2], [0, 1]]}
    write(tmp_path, "ppe-correctness", lines([row]))
    found = load("ppe-correctness", tmp_path)
    assert [(r.place, r.responses) for r in found] == [("0-1", ("r0", "r1")), ("2-3", ("r2", "r3"))]
    assert found.notes[-1] == "2 sampled pairs that are repeated (or reversed) are asked once"
    assert found.notes[0].startswith("no rows of MMLU-Pro, GPQA, MBPP-Plus, IFEval: not the off")
    single = load("ppe-correctness", tmp_path, rules=Rules(form="single"))
    assert [(r.responses, r.labels) for r in single][1] == (("r1",), (0.0,))
