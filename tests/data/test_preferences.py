"""Preference records: every row shape, every kind of damage; write then read is the identity."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.data.preferences import (
    DataError,
    Preference,
    Records,
    content_id,
    parse_row,
    read_preferences,
    require_unique_best,
    write_preferences,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
GOOD: dict[str, Any] = {"id": "a", "query": "Why?", "responses": ["x", "y"], "labels": [1, 0]}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def record(**kwargs: Any) -> Preference:
    return parse_row({**GOOD, **kwargs})


# ------------------------------------------------------------------------------ row shapes

SHAPES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "query and labels": (GOOD, (["Why?"], ["x", "y"], [1, 0])),
    "prompt and scores": (
        {"prompt": "Why?", "responses": ["x", "y", "z"], "scores": [2, 7.5, -1]},
        (["Why?"], ["x", "y", "z"], [2, 7.5, -1]),
    ),
    "turns and best": (
        {"turns": [USER, ASSISTANT, USER], "responses": ["x", "y"], "best": 1},
        (["Why?", "Because.", "Why?"], ["x", "y"], [0, 1]),
    ),
    "messages, ties": (
        {"messages": [USER], "responses": ["x", "y"], "labels": [1, 1]},
        (["Why?"], ["x", "y"], [1, 1]),
    ),
    "an empty response": (
        {"query": "Why?", "responses": ["", "y"], "labels": [0, 1]},
        (["Why?"], ["", "y"], [0, 1]),
    ),
    "prompt as messages": (
        {"prompt": [USER], "responses": ["x"], "labels": [0]},
        (["Why?"], ["x"], [0]),
    ),
    "null is absent": (
        {**GOOD, "turns": None, "chosen": None, "domain": None, "reference": None},
        (["Why?"], ["x", "y"], [1, 0]),
    ),
    "single, bool": ({"query": "Why?", "response": "x", "label": True}, (["Why?"], ["x"], [1])),
    "single, int": ({"query": "Why?", "response": "x", "label": 0}, (["Why?"], ["x"], [0])),
    "pair of strings": (
        {"prompt": "Why?", "chosen": "x", "rejected": "y"},
        (["Why?"], ["x", "y"], [1, 0]),
    ),
    "pair of messages": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "No."}]},
        (["Why?"], ["Because.", "No."], [1, 0]),
    ),
    "pair that repeats the prompt, beside messages": (
        {
            "prompt": "Why?",
            "messages": [USER, ASSISTANT],
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, {**ASSISTANT, "content": "No."}],
        },
        (["Why?"], ["Because.", "No."], [1, 0]),
    ),
    "pair of conversations": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "No."}]},
        (["Why?"], ["Because.", "No."], [1, 0]),
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant: good",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:",
        },
        (["a", "b", "c"], ["good", ""], [1, 0]),
    ),
    "HH, a reply that makes up further turns": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b  Human: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: no",
        },
        (["a"], ["b  Human: c\n\nAssistant: d", "no"], [1, 0]),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_row_shapes(name: str) -> None:
    row, (said, responses, labels) = SHAPES[name]
    got = parse_row(row)
    assert [t["content"] for t in got.turns] == said
    assert [t["role"] for t in got.turns] == ["user", "assistant", "user"][: len(said)]
    assert got.responses == tuple(responses)
    assert got.labels == tuple(labels) and all(type(x) is float for x in got.labels)


def test_optional_fields_and_numbered_ids() -> None:
    got = record(id=7, domain="maths", reference="42", principles=["short", "right"])
    assert (got.id, got.domain, got.reference) == ("7", "maths", "42")
    assert got.principles == ("short", "right")
    assert got.query == "Why?" and got.best == 0


def test_ids_from_content_are_stable() -> None:
    row = {k: v for k, v in GOOD.items() if k != "id"}
    # Pinned: saved rollouts and caches refer to records by this id.
    assert parse_row(row).id == "91e225c9ef4e3ecc"
    same = {"turns": [USER], "responses": ["x", "y"], "best": 0}
    assert parse_row(row, "f.jsonl:3").id == parse_row(same, "g.jsonl:9").id
    ids = {parse_row({**row, **change}).id for change in ({}, {"labels": [0, 1]}, {"domain": "d"})}
    assert len(ids) == 3
    got = parse_row(row)
    assert got.id == content_id(got.turns, got.responses, got.labels)


def test_rows_that_say_the_same_get_numbered_ids(tmp_path: Path) -> None:
    row = {k: v for k, v in GOOD.items() if k != "id"}
    first, second, third = read_preferences(jsonl(tmp_path / "a.jsonl", row, row, row))
    assert [second.id, third.id] == [f"{first.id}-2", f"{first.id}-3"]


def test_best_and_ties() -> None:
    tied = record(id="t", labels=[1, 1])
    assert not tied.has_unique_best and record().has_unique_best
    assert parse_row({"query": "q", "response": "x", "label": 0}).has_unique_best
    with pytest.raises(DataError, match="no unique best"):
        _ = tied.best
    require_unique_best([record()])
    with pytest.raises(DataError, match=r"1 record\(s\).*'t' \[1.0, 1.0\]"):
        require_unique_best([record(), tied])


# ------------------------------------------------------------------------------ damage

LONE = "\ud83d"
# A row that replaces GOOD, or changes to it; the field that the message must name; words of it.
CORRUPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"id": ""}, "id", "empty"),
    ({"id": True}, "id", "bool True"),
    ({"id": ["a"]}, "id", "list"),
    ({"query": 3}, "query", "int 3"),
    ({"query": "  "}, "query", "empty"),
    ({"query": None}, "query", "null"),
    ({"query": "a" + LONE}, "query", "lone surrogate"),
    ({"turns": [USER]}, "turns", "together with 'query'"),
    ({"query": None, "turns": "Why?"}, "turns", "list of messages"),
    ({"query": None, "turns": []}, "turns", "user's turn"),
    ({"query": None, "turns": ["Why?"]}, "turns[0]", "str 'Why?'"),
    ({"query": None, "turns": [{"speaker": "human", "text": "a"}]}, "turns[0]", "'role'"),
    ({"query": None, "turns": [USER, ASSISTANT]}, "turns", "assistant's"),
    ({"query": None, "turns": [{**USER, "role": "poet"}]}, "turns[0].role", "use one of"),
    (
        {"query": None, "turns": [{**USER, "content": [{"type": "text"}]}]},
        "turns[0].content[0]",
        "null",
    ),
    ({"responses": None}, "responses", "give either"),
    ({"responses": []}, "responses", "empty list"),
    ({"responses": "xy"}, "responses", "list of strings"),
    ({"responses": ["x", 2]}, "responses[1]", "int 2"),
    ({"responses": ["x", None]}, "responses[1]", "null"),
    ({"responses": ["x", LONE]}, "responses[1]", "lone surrogate \\ud83d at character 0"),
    ({"responses": ["x"]}, "labels", "2 for 1"),
    ({"labels": [1]}, "labels", "1 for 2"),
    ({"labels": None}, "labels", "null"),
    ({"labels": 1}, "labels", "list of numbers"),
    ({"labels": [1, "high"]}, "labels[1]", "str 'high'"),
    ({"labels": [True, 0]}, "labels[0]", "bool"),
    ({"labels": [1, None]}, "labels[1]", "null"),
    ({"labels": [1, float("nan")]}, "labels[1]", "finite"),
    ({"labels": [float("-inf"), 1]}, "labels[0]", "finite"),
    ({"labels": [1, 10**400]}, "labels[1]", "finite"),
    ({"scores": [1, 0]}, "scores", "together with 'labels'"),
    ({"labels": None, "best": 2}, "best", "0..1"),
    ({"labels": None, "best": -1}, "best", "0..1"),
    ({"labels": None, "best": True}, "best", "0..1"),
    ({"labels": None, "best": 0, "responses": ["x"]}, "best", "one response"),
    ({"responses": ["x"], "labels": [2]}, "labels", "1 (correct) or 0"),
    ({"domain": 3}, "domain", "string"),
    ({"reference": ["r"]}, "reference", "string"),
    ({"principles": "be kind"}, "principles", "list of strings"),
    ({"principles": ["a", 1]}, "principles[1]", "int 1"),
    ({"chosen": "x", "rejected": "y"}, "responses", "both 'responses' and 'chosen'"),
    ({"response": "x", "label": 1}, "responses", "both"),
]
ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "responses", "give either"),
    ({"query": "q", "response": "x"}, "label", "missing"),
    ({"query": "q", "response": "x", "label": 0.5}, "label", "0.5"),
    ({"query": "q", "response": "x", "label": "yes"}, "label", "str 'yes'"),
    ({"query": "q", "response": ["x"], "label": 1}, "response", "list"),
    ({"prompt": "q", "chosen": "x"}, "rejected", "missing"),
    ({"prompt": "q", "rejected": "x"}, "chosen", "missing"),
    ({"prompt": "q", "chosen": "x", "rejected": [ASSISTANT]}, "chosen", "two strings"),
    ({"prompt": "q", "chosen": 1, "rejected": 2}, "chosen", "two strings"),
    ({"prompt": "q", "chosen": "x", "rejected": "y", "labels": [0, 1]}, "labels", "together with"),
    ({"chosen": "x", "rejected": "y"}, "chosen", "no 'prompt'"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "chosen", "no HH"),
    ({"chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "chosen", "no conversation"),
    ({"chosen": [USER], "rejected": [USER]}, "chosen", "not the assistant's"),
    (
        {
            "chosen": [USER, ASSISTANT],
            "rejected": [{**USER, "content": "How?"}, ASSISTANT],
        },
        "rejected",
        "not that of 'chosen'",
    ),
    (
        {"prompt": "How?", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        "chosen",
        "another conversation",
    ),
]


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [({**GOOD, **change}, field, words) for change, field, words in CORRUPTIONS] + ROWS,
)
def test_a_bad_row_is_named(
    row: dict[str, Any], field: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "d.jsonl", {**GOOD, "id": "first"}, row, {**GOOD, "id": "last"})
    with pytest.raises(DataError) as error:
        read_preferences(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: {field}: "), message
    assert words in message and "; fix: " in message
    kept = "; --skip-bad-rows leaves such rows out"
    assert message.endswith(kept)

    with caplog.at_level(logging.WARNING):
        got = read_preferences(path, skip_bad_rows=True)
    assert [r.id for r in got] == ["first", "last"]
    assert got.skipped == (message.removesuffix(kept),)
    assert "1 bad rows left out" in caplog.text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{not json}", "not valid JSON"),
        (b"[1, 2]", "list where an object was expected"),
        (b'{"id": "\xff"}', "not UTF-8: byte 0xff at 8"),
        (b'{"id": "a", "id": "b"}', "id: appears twice"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"id": ' + b"[" * 100_000, "nested"),
        (b'{"id": "a", "quer', "cut off"),
    ],
)
def test_a_bad_line_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line)
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value)
    assert len(read_preferences(path, skip_bad_rows=True).skipped) == 1


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", GOOD)
    b = jsonl(tmp_path / "b.jsonl", {**GOOD, "id": "b"}, GOOD)
    with pytest.raises(DataError) as error:
        read_preferences(tmp_path)
    assert str(error.value).startswith(f"{b}:2: id: 'a' is already the id of {a}:1; fix:")
    assert len(read_preferences(tmp_path, skip_bad_rows=True)) == 2


def test_bad_files(tmp_path: Path) -> None:
    def fails(words: str, source: Any) -> None:
        for skip in (False, True):  # only rows can be skipped
            with pytest.raises(DataError, match=words):
                read_preferences(source, skip_bad_rows=skip)

    fails("no such file", tmp_path / "absent.jsonl")
    fails("no such file, directory or match", str(tmp_path / "*.jsonl"))
    fails("no data file in this directory", tmp_path)
    fails("no files given", [])
    (tmp_path / "notes.txt").write_text("hello")
    fails("not a data file.*jsonl", tmp_path / "notes.txt")
    for name, blob in [("e.jsonl", b""), ("n.jsonl", b"\n\n"), ("e.json", b""), ("l.json", b"[]")]:
        (tmp_path / name).write_bytes(blob)
        fails("the file is empty", tmp_path / name)
    (tmp_path / "o.json").write_text("{}")
    fails("dict at the top", tmp_path / "o.json")
    jsonl(tmp_path / "lines.json", GOOD, GOOD)
    fails("call it .jsonl", tmp_path / "lines.json")
    whole = gzip.compress(json.dumps(GOOD).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    fails("cannot be read", tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(GOOD))
    fails("cannot be read", tmp_path / "plain.jsonl.gz")
    (tmp_path / "plain.jsonl.zst").write_text(json.dumps(GOOD))
    fails("cannot be read", tmp_path / "plain.jsonl.zst")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no")
    fails("cannot be read", tmp_path / "p.parquet")
    jsonl(tmp_path / "allbad.jsonl", {})
    with pytest.raises(DataError, match="all 1 rows are bad; the first: "):
        read_preferences(tmp_path / "allbad.jsonl", skip_bad_rows=True)


def test_errors_survive_pickling() -> None:
    error = DataError("id", "empty", "give one", "f:1")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field) == ("f:1: id: empty; fix: give one", "id")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"labels": (1.0,)},
        {"labels": (1.0, float("nan"))},
        {"responses": ["x", "y"]},
        {"responses": ()},
        {"turns": ()},
        {"turns": (ASSISTANT,)},
        {"id": ""},
        {"principles": ["a"]},
    ],
)
def test_a_record_that_exists_is_valid(kwargs: dict[str, Any]) -> None:
    good = {"id": "a", "turns": (USER,), "responses": ("x", "y"), "labels": (1.0, 0.0)}
    Preference(**good)
    with pytest.raises(DataError):
        Preference(**{**good, **kwargs})


# ------------------------------------------------------------------------------ files


def test_lines_end_at_newline_only(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x1cd\x0be\rf"
    path = tmp_path / "d.jsonl"
    row = json.dumps({**GOOD, "query": odd}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    assert read_preferences(path)[0].query == odd


def test_directories_patterns_and_lists_read_in_one_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", {**GOOD, "id": name})
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "d.jsonl", {**GOOD, "id": "d"})
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")

    def ids(source: Any) -> list[str]:
        return [r.id for r in read_preferences(source)]

    assert ids(tmp_path) == ids(str(tmp_path / "*.jsonl")) == ["a", "b", "c"]
    assert ids(str(tmp_path / "**" / "*.jsonl")) == ["a", "b", "c", "d"]
    assert ids([tmp_path / "c.jsonl", tmp_path]) == ["c", "a", "b"]
    assert read_preferences(tmp_path)[1].source == f"{tmp_path / 'b.jsonl'}:1"


def test_unused_fields_are_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        read_preferences(jsonl(tmp_path / "d.jsonl", {**GOOD, "refrence": "typo", "lang": "en"}))
    assert "fields not used: lang, refrence" in caplog.text


def test_parquet_rows_are_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y"}, {"prompt": "q", "chosen": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:row 2: rejected: null")
    got = read_preferences(path, skip_bad_rows=True)
    assert got[0].labels == (1.0, 0.0) and got[0].source == f"{path}:row 1"

    raw = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": raw, "chosen": ["x", "x"], "rejected": ["y", "y"]})
    pq.write_table(table, path)
    with pytest.raises(DataError, match="row 2: prompt: not UTF-8"):
        read_preferences(path)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FILLED = TEXT.filter(str.strip)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    n = draw(st.integers(1, 4))
    before = draw(
        st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=3)
    )
    turns = [*before, ("user", draw(FILLED))]
    label = st.sampled_from([0.0, 1.0]) if n == 1 else NUMBER
    responses = draw(st.lists(TEXT, min_size=n, max_size=n))
    labels = draw(st.lists(label, min_size=n, max_size=n))
    same = dict(zip(responses, labels, strict=True))  # one label a text
    return Preference(
        id=draw(FILLED),
        turns=tuple({"role": r, "content": c} for r, c in turns),
        responses=tuple(responses),
        labels=tuple(same[text] for text in responses),
        domain=draw(TEXT),
        reference=draw(st.none() | TEXT),
        principles=draw(st.none() | st.lists(TEXT, max_size=3).map(tuple)),
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_write_then_read_is_the_identity(
    suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("out") / f"records{suffix}"

    @settings(max_examples=60, deadline=None)
    @given(st.lists(preferences(), min_size=1, max_size=4, unique_by=lambda r: r.id))
    def check(records: list[Preference]) -> None:
        write_preferences(path, records)
        again = read_preferences(path)
        assert isinstance(again, Records) and again == records and again.skipped == ()
        first = path.read_bytes()
        write_preferences(path, again)
        assert path.read_bytes() == first  # no clock, no process in the file

    check()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written is left


def test_writing_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        write_preferences(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match="'a' twice"):
        write_preferences(tmp_path / "a.jsonl", [record(), record()])
    with pytest.raises(DataError, match="not a data file"):
        write_preferences(tmp_path / "a.csv", [record()])
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    write_preferences(path, [record()])
    before = path.read_bytes()
    assert before[4:8] == bytes(4)  # no time in the gzip header: equal records, equal bytes

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_preferences(path, [record(id="b")])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------ real data


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here (real data beside the repository)")
    return path


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("hh_rlhf/harmless-base/test.jsonl.gz", 2312),
        ("hh_rlhf/helpful_train_sample.jsonl", 500),
    ],
)
def test_hh_is_read_whole(name: str, rows: int) -> None:
    path = real(name)
    got = read_preferences(path)
    assert len(got) == rows and all(r.labels == (1.0, 0.0) for r in got)
    # Each text is there: what was written, spaces aside, is what the turns and replies say.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for line, r in zip(lines, got, strict=True):
            for key, reply in zip(("chosen", "rejected"), r.responses, strict=True):
                names = {"user": "Human", "assistant": "Assistant"}
                said = [f"{names[t['role']]}:{t['content']}" for t in r.turns]
                text = "".join([*said, "Assistant:", reply])
                assert "".join(text.split()) == "".join(json.loads(line)[key].split())


def test_helpsteer_as_single_responses(tmp_path: Path) -> None:
    source = real("helpsteer1_sample/nvidia_HelpSteer_sample.jsonl")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]
    single = [
        {"query": r["prompt"], "response": r["response"], "label": r["correctness"] >= 3}
        for r in rows
    ]
    got = read_preferences(jsonl(tmp_path / "h.jsonl", *single))
    assert len(got) == len(rows) == 500
    assert sum(r.labels[0] for r in got) == sum(r["correctness"] >= 3 for r in rows)
