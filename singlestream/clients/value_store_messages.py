"""What the value store's clients send and receive: typed replies, and its requests written once for both clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypedDict, TypeVar, cast

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from singlestream.clients.value_store_replies import Reply, Split
from singlestream.contracts import Sampling
from singlestream.errors import ConfigError, ServiceError

Order = Literal["id", "value", "weight", "visits", "n_eff", "updated"]

TIMEOUT_S = 60.0
"""Of one request."""
IMPORT_TIMEOUT = httpx.Timeout(TIMEOUT_S, read=3600.0)
"""The store answers an import once all of it is in: half a minute for each million prompts, measured."""

PROMPTS_PER_REQUEST = 2000
"""Longer lists are sent in parts; the store's bound is its setting ``max_prompts_per_request``."""


class NewPrompt(BaseModel):
    """A prompt to insert or replace.

    Args:
        question: the task's text, without any chat template; with ``source`` it makes the prompt's id.
        answer: ground truth for the grader.
        source: data set it came from.
        environment: name of the environment that runs and grades it.
        split: ``train`` prompts are drawn for training, ``eval`` prompts by jobs only.
        prior_rewards: offline rewards in [0, 1] for the prior of a prompt without visits; None leaves the prior.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    answer: str
    source: str = "default"
    environment: str = "math_python"
    split: Split = "train"
    prior_rewards: list[Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]] | None = None


class JobResult(Reply):
    """One result of a job; ``reward`` is None where it failed for good."""

    prompt_id: str
    repetition: int
    lease_id: str
    reward: float | None
    version: int | None
    turns: int
    tool_calls: int
    action_tokens: int
    response_tokens: int
    answer: str | None = None
    end_reason: str
    failures: int


@dataclass(frozen=True)
class Request:
    """One request, before it is sent."""

    method: str
    path: str
    json: Any = None
    params: dict[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """Arguments for httpx."""
        options: dict[str, Any] = {}
        if self.json is not None:
            options["json"] = self.json
        if self.params is not None:
            options["params"] = {name: value for name, value in self.params.items() if value is not None}
        return options


T = TypeVar("T", bound=BaseModel)


def read_reply(request: Request, reply: httpx.Response, kind: type[T]) -> T:
    """A reply as a model. Raises `ServiceError`."""
    check_reply(request, reply)
    try:
        return kind.model_validate_json(reply.content)
    except ValidationError as error:
        detail = f"the reply is not what this client knows: {error}"
        raise ServiceError("value_store", f"{request.method} {reply.url}", detail, reply.status_code) from error


def check_reply(request: Request, reply: httpx.Response) -> None:
    """Raise `ServiceError` with the store's own words for anything but a success."""
    if reply.is_success:
        return
    try:
        detail = str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = reply.text[:2000]
    status = f"{reply.status_code} {detail}"
    raise ServiceError("value_store", f"{request.method} {reply.url}", status, reply.status_code)


def lost_reply(request: Request, error: httpx.HTTPError) -> ServiceError:
    """The error of a request that got no reply."""
    return ServiceError("value_store", f"{request.method} {request.path}", f"{type(error).__name__}: {error}")


def token_header(token: str | None) -> dict[str, str]:
    """Headers that show a token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def upsert_requests(prompts: Sequence[NewPrompt]) -> Iterator[Request]:
    """Requests of an upsert, in parts."""
    for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
        part = prompts[start : start + PROMPTS_PER_REQUEST]
        yield Request("POST", "/v1/prompts", [prompt.model_dump() for prompt in part])


def value_requests(ids: Sequence[str] | None, texts: Sequence[str] | None, source: str | None) -> Iterator[Request]:
    """Requests of a look-up, in parts. Raises ValueError unless either ids or texts are given."""
    if (ids is None) == (texts is None):
        raise ValueError("give either ids or texts")
    name, items = ("ids", ids) if ids is not None else ("texts", texts)
    for start in range(0, len(items or ()), PROMPTS_PER_REQUEST):
        part = list((items or ())[start : start + PROMPTS_PER_REQUEST])
        yield Request("POST", "/v1/values", {name: part, "source": source})


class PromptFilters(TypedDict, total=False):
    """What ``GET /v1/prompts`` takes; bounds are included, and one left out, or None, is open."""

    source: str | None
    split: Split | None
    q: str | None
    """Text in the question, any case."""
    v_hat_min: float | None
    v_hat_max: float | None
    visits_min: int | None
    visits_max: int | None
    n_eff_min: float | None
    """Of n_eff as it is now, faded."""
    n_eff_max: float | None
    order: Order
    """Default: id."""
    descending: bool
    limit: int
    """Prompts a page."""
    cursor: str | None
    """From the page before."""


def list_request(filters: PromptFilters) -> Request:
    """Request for one page. Raises TypeError for a filter that there is not: the store would pass over it."""
    if unknown := filters.keys() - PromptFilters.__annotations__.keys():
        raise TypeError(f"no such filter: {', '.join(sorted(unknown))}")
    return Request("GET", "/v1/prompts", params=cast(dict[str, Any], filters))


def jobs_request(cursor: str | None) -> Request:
    """Request for one page of jobs."""
    return Request("GET", "/v1/jobs", params={"cursor": cursor})


def job_request(
    purpose: str,
    split: Split | None,
    prompt_ids: Sequence[str] | None,
    n: int,
    limit: int | None,
    sampling: Sampling | None,
    pinned: bool,
    resume: bool,
) -> Request:
    """Request for a job."""
    body = {
        "purpose": purpose,
        "split": split,
        "prompt_ids": list(prompt_ids) if prompt_ids is not None else None,
        "n": n,
        "limit": limit,
        "sampling": sampling.model_dump() if sampling else None,
        "pinned": pinned,
        "resume": resume,
    }
    return Request("POST", "/v1/jobs", body)


Format = Literal["ndjson", "parquet", "offline_values"]


class Imported(Reply):
    """What an import did: prompts inserted or updated, those with a prior, and texts of no known prompt."""

    prompts: int
    priors: int
    unknown: int


def import_request(format: Format, source: str | None) -> Request:
    """Request of an import; its body is the file."""
    return Request("POST", "/v1/import", params={"format": format, "source": source})


def export_request(format: Format, job: str | None) -> Request:
    """Request of an export."""
    return Request("GET", "/v1/export", params={"format": format, "job": job})


def format_of(path: Path) -> Format:
    """Format by a file's name; .json is the recipe's offline values. Raises `ConfigError` for any other name."""
    formats: dict[str, Format] = {
        ".ndjson": "ndjson",
        ".jsonl": "ndjson",
        ".parquet": "parquet",
        ".json": "offline_values",
    }
    if path.suffix not in formats:
        raise ConfigError(f"{path}: the name must end in one of {', '.join(formats)}, which says the format")
    return formats[path.suffix]


@contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name once all of it is written; of a part nothing is left."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
