"""Anything that the OpenAPI document allows, sent to the running application: no 5xx, nothing undocumented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from tests.services.value_store.conftest import StoreProcess

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = StoreProcess(Path(tmp_path_factory.mktemp("openapi")), Keys("openapi"), redis_server.url)
    store.start()
    prompts = [{"question": f"q{i}", "answer": str(i)} for i in range(20)]
    httpx.post(f"{store.url}/v1/prompts", json=prompts).raise_for_status()
    yield store.url
    assert store.stop() == 0


@pytest.mark.timeout(600)
def test_the_application_keeps_its_document(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
    failures, tried = [], []
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.append(operation.label)

        @given(case=operation.as_strategy())
        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def attempt(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=url, checks=CHECKS)

        try:
            attempt()
        except Exception as error:
            failures.append(f"{operation.label}: {error}")
    assert len(tried) >= 18
    assert not failures, "\n\n".join(failures)


def test_the_document_can_be_generated_from(url: str) -> None:
    document = httpx.get(f"{url}/v1/openapi.json").json()
    seen = set()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert re.fullmatch(r"[a-z_0-9]+", operation["operationId"])
            assert operation["operationId"] not in seen
            seen.add(operation["operationId"])
            for status, reply in operation["responses"].items():
                if int(status) >= 400:
                    assert list(reply["content"]) == ["application/problem+json"], (method, path, status)
