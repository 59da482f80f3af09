"""A golden request and reply of each route, as the client of each project sends it and reads it.

Write the replies anew with `GOLDEN=write pytest tests/serving/test_golden.py`, and read the diff:
these fields are other projects', not ours.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).with_name("golden")
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
# What differs from call to call; the prefix of an id is a part of the protocol.
_CHANGES = {"created", "created_at", "seconds"}
_ID = re.compile(r"^([a-z]+(?:-[a-z]+)*)-[0-9a-f]{32}$")


def stable(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: stable(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [stable(inner) for inner in value]
    if name in _CHANGES:
        return f"<{type(value).__name__}>"
    if isinstance(value, str):
        return _ID.sub(r"\1-<id>", value)
    return value


@pytest.mark.parametrize("case", CASES)
def test_golden(case, shared):
    client = shared[1]
    path = FOLDER / f"{case}.json"
    golden = json.loads(path.read_text(encoding="utf-8"))
    asked = golden["request"]
    reply = client.request(asked["method"], asked["path"], json=asked.get("json"))
    found = {"status": reply.status_code, "json": stable(reply.json())}
    if "retry-after" in reply.headers:
        found["retry-after"] = reply.headers["retry-after"]
    if os.environ.get("GOLDEN") == "write":
        golden["reply"] = found
        path.write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == golden["reply"]
