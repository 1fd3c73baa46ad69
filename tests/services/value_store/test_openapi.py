"""Anything that the OpenAPI document allows, sent to the running application: no 5xx, nothing undocumented."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.value_store import schemas
from services.value_store.examples import EXAMPLES
from singlestream.clients import value_store_replies
from singlestream.clients.value_store import AsyncValueStore, NewPrompt
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from singlestream.streams.ledger import prompt_id
from tests.services.value_store.conftest import StoreProcess
from tests.services.value_store.world import World, until

KEYS = Keys(f"openapi-{os.getpid()}")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@dataclass(frozen=True)
class Lived:
    """A store with a past, and what it knows: a prompt with visits and a trajectory, a finished job with results."""

    url: str
    prompt_id: str
    job_id: str


async def live(store: StoreProcess, redis_url: str) -> Lived:
    redis = connect(redis_url)
    world = World(redis, KEYS)
    await world.start()
    await world.publish(0)
    async with AsyncValueStore(store.url) as client:
        ids = await client.upsert([NewPrompt(question=f"q{i}", answer=str(i)) for i in range(20)])
        job = await client.create_job("estimate", prompt_ids=ids[:3], n=2)
        await client.set_training("running")

        async def told() -> bool:
            await world.report()
            await world.play()
            await world.train()
            finished = (await client.job(job.job_id)).state == "finished"
            return finished and bool(await client.history(ids[0]) and await client.trajectories(ids[0]))

        await until(told, "a finished job, and a prompt with a history and a trajectory")
    await redis.aclose()
    return Lived(store.url, ids[0], job.job_id)


@pytest.fixture(scope="module")
def lived(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    store = StoreProcess(Path(tmp_path_factory.mktemp("openapi")), KEYS, redis_server.url, total_steps=10_000)
    store.start()
    yield asyncio.run(live(store, redis_server.url))
    assert store.stop() == 0


def name_known(case: schemathesis.Case, lived: Lived) -> None:
    """Put what the store knows where the request names a prompt or a job: a made-up number never meets one."""
    for parameters in (case.path_parameters, case.query):
        for name, known in (("prompt_id", lived.prompt_id), ("job_id", lived.job_id), ("job", lived.job_id)):
            if parameters is not None and name in parameters:
                parameters[name] = known
    if isinstance(case.body, dict):
        for name in ("ids", "prompt_ids"):
            if isinstance(case.body.get(name), list):
                case.body[name] = [*case.body[name], lived.prompt_id]


def attempt(operation: Any, lived: Lived) -> set[int]:
    """Send requests of one operation, half of them about what is known; returns the statuses seen."""
    seen = set()

    @given(case=operation.as_strategy(), known=st.booleans())
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def one(case: schemathesis.Case, known: bool) -> None:
        if known:
            name_known(case, lived)
        seen.add(case.call_and_validate(base_url=lived.url, checks=CHECKS).status_code)

    one()
    return seen


@pytest.mark.timeout(600)
def test_the_application_keeps_its_document(lived: Lived) -> None:
    schema = schemathesis.openapi.from_url(f"{lived.url}/v1/openapi.json")
    failures, tried = [], []
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.append(operation.label)
        try:
            seen = attempt(operation, lived)
        except Exception as error:
            failures.append(f"{operation.label}: {error}")
            continue
        if not seen & {200, 201}:
            failures.append(f"{operation.label}: no success was seen, only {sorted(seen)}")
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


def test_the_examples_tell_of_one_prompt() -> None:
    prompt = EXAMPLES["PromptIn"]
    [shown] = EXAMPLES["Page"]["prompts"]
    assert shown["prompt_id"] == prompt_id(prompt["source"], prompt["question"])
    assert shown["prompt_id"] in str(schemas.JobIn.model_json_schema())


def test_the_document_can_be_generated_from(lived: Lived) -> None:
    document = httpx.get(f"{lived.url}/v1/openapi.json").json()
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
