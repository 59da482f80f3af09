"""Requests made from the OpenAPI document, sound and unsound ones: replies are as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import served
from fakes import FakeSession
from hypothesis import HealthCheck, settings

from grm_jax.serving.limits import Limits

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
# A body of the right types may say what can not be judged (a conversation that ends with the
# assistant, say): 400. It is never 422, which is for types. And a deadline may be too short.
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "429", "504"]},
    "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]},
}


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    with served(FakeSession(), limits=Limits(responses=256, k=1024, queue=10**6)) as client:
        config = schemathesis.Config.from_dict({"checks": CHECKS})
        yield schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", config=config)


@schemathesis.pytest.from_fixture("document").parametrize()
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_replies_are_as_the_document_says(case):
    case.call_and_validate()
