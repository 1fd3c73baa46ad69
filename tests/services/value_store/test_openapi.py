"""Anything that the OpenAPI document allows, sent to the running application: no 5xx, nothing undocumented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from services.value_store import schemas
from services.value_store.examples import EXAMPLES
from singlestream.clients import value_store_replies
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


def example_of(document: dict[str, Any], content: dict[str, Any]) -> object:
    """The example of a body or parameter, its own or its schema's; of a list, that of its items."""
    if found := content.get("example") or content.get("examples"):
        return found
    schema = content.get("schema", {})
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema.get("examples") or ("items" in schema and example_of(document, {"schema": schema["items"]}))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_their_schema_says(name: str) -> None:
    model = getattr(schemas, name, None) or getattr(value_store_replies, name)
    model.model_validate(EXAMPLES[name])
    assert set(EXAMPLES[name]) <= set(model.model_fields)


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
            for parameter in operation.get("parameters", []):
                schema = parameter["schema"]
                assert {"enum", "default"} & set(schema) or "enum" in str(schema) or example_of(document, parameter), (
                    path,
                    parameter["name"],
                )
            bodies = [operation["requestBody"]] if "requestBody" in operation else []
            for body in (*bodies, *operation["responses"].values()):
                for media, content in body.get("content", {}).items():
                    assert media == "application/vnd.apache.parquet" or example_of(document, content), (path, media)
            for status, reply in operation["responses"].items():
                if int(status) >= 400:
                    assert list(reply["content"]) == ["application/problem+json"], (method, path, status)
