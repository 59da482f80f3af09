"""Replies that follow a schema: found wherever a model puts them, and never of another shape."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grm_jax.data.rows import DataError
from grm_jax.errors import UserError

pytest.importorskip("jsonschema")
from grm_jax.serving.protocols.json_reply import ReplySchema, json_text

SCORE = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 10}},
    "required": ["score"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 7}',
        '  {"score": 7}\n',
        'Let me think.\n```json\n{"score": 7}\n```\nDone.',
        'The form is {"score": 70}; my answer is {"score": 7} - final.',
        '{"score": 3} was my first thought. {"score": 7}',
        'As {"a": {"b": 1}} shows: {"score": 7}',
    ],
)
def test_json_is_found(text):
    assert json.loads(json_text(text, ReplySchema(SCORE))) == {"score": 7}


@pytest.mark.parametrize(
    "text",
    ["", "seven", '{"score": "7"}', '{"score": 11}', '{"score": 7, "x": 1}', '{"score": 7', "[7]",
     '{"score": NaN}', "null", "{" * 100_000],
)  # fmt: skip
def test_what_does_not_follow_is_refused(text):
    with pytest.raises(UserError, match="response_format"):
        json_text(text, ReplySchema(SCORE))


def test_any_object_without_a_schema():
    assert json_text('so: {"a": [1]}', None) == '{"a": [1]}'
    with pytest.raises(UserError):
        json_text("[1, 2]", None)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no such type"},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}},
        {"patternProperties": {"(a+)+$": {}}},
    ],
)
def test_bad_schemas_are_refused(schema):
    with pytest.raises(DataError, match="schema"):
        ReplySchema(schema)


def test_schemas_from_elsewhere_are_not_fetched(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    (tmp_path / "schema.json").write_text("{}")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/schema.json"
        for place in (where, (tmp_path / "schema.json").as_uri()):
            with pytest.raises(DataError, match="can not be followed"):
                json_text("{}", ReplySchema({"$ref": place}))
        server.shutdown()
    assert Handler.asked == 0


def test_a_schema_that_refers_to_itself_alone_ends():
    with pytest.raises(DataError, match="can not be followed"):
        json_text("{}", ReplySchema({"$ref": "#"}))


def test_a_verdict_is_cut_to_what_a_closed_schema_names():
    said = {"score": 7, "other": 1}
    assert ReplySchema(SCORE).project(said) == {"score": 7}
    assert ReplySchema({"type": "object"}).project(said) == said


@given(st.text(alphabet='{}[]",:score 170\\\n`', max_size=60))
def test_whatever_is_returned_follows_the_schema(text):
    try:
        found = json_text(text, ReplySchema(SCORE))
    except UserError:
        return
    assert ReplySchema(SCORE).problem(json.loads(found)) is None
