"""Requests made from the OpenAPI document, sound and unsound ones: replies are as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import served
from fakes import FakeSession
from hypothesis import HealthCheck, given, settings

from grm_jax.serving.groups import GroupOptions
from grm_jax.serving.limits import Limits

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
# A body of the right types may say what can not be judged (a conversation that ends with the
# assistant, say), or what a protocol's own rules refuse. And a deadline may be too short.
REFUSED = ["400", "404", "422", "429", "503", "504"]
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["2xx", *REFUSED]},
    "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503", "504"]},
}


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    limits = Limits(responses=256, k=1024, queue=10**6)
    # Without a window, in which a rollout would wait for its group.
    with served(FakeSession(), limits=limits, groups=GroupOptions(window=0)) as client:
        config = schemathesis.Config.from_dict({"checks": CHECKS})
        yield schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", config=config)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name)
def test_replies_are_as_the_document_says(document, mode):
    """Sound bodies and unsound ones: no error of the server, no status, type or field that the
    document does not know, no unsound body that is taken."""
    checked = 0
    for found in document.get_all_operations():
        operation = found.ok()
        if mode.is_negative and operation.method == "get":
            continue  # nothing of it can be unsound

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=10, suppress_health_check=list(HealthCheck), database=None)
        def check(case):
            for where in (case.query, case.body):
                if isinstance(where, dict) and type(where.get("window")) in (int, float):
                    where["window"] = min(where["window"], 0)  # sound ones: judged at once
            case.call_and_validate()

        check()
        checked += 1
    assert checked
