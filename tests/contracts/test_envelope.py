from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from singlestream.contracts import EndOfRun, Lease, Segment, Trajectory, decode, decode_as, encode
from singlestream.contracts.envelope import KINDS
from singlestream.contracts.message import MAX_VERSION
from singlestream.errors import InvalidMessage, UnknownMessage
from tests.contracts.messages import EXAMPLES, trajectory

GOLDEN = Path(__file__).parent / "golden"


def same(a: object, b: object) -> bool:
    """Messages hold arrays, which have no truth value: compare what would be sent."""
    return a.model_dump() == b.model_dump()  # type: ignore[attr-defined]


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind: str) -> None:
    """A run's streams outlive a release: these bytes may change only together with SCHEMA_VERSION."""
    golden = bytes.fromhex((GOLDEN / f"{kind}.hex").read_text())
    assert encode(EXAMPLES[kind]) == golden
    assert same(decode(golden), EXAMPLES[kind])


@pytest.mark.parametrize(
    ("kind", "absent"),
    [("lease", {"pinned": False, "source": "default"}), ("trajectory", {"answer": None})],
    ids=["lease", "trajectory"],
)
def test_bytes_from_before_a_field_was_added_are_read_with_its_default(kind: str, absent: dict[str, object]) -> None:
    older = decode(bytes.fromhex((GOLDEN / "older" / f"{kind}.hex").read_text()))
    assert same(older, EXAMPLES[kind].model_copy(update=absent))


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=50),
    reward=st.floats(0, 1),
    version=st.integers(0, MAX_VERSION),
)
def test_round_trip(tokens: list[int], reward: float, version: int) -> None:
    logprobs = -np.arange(len(tokens), dtype=np.float32)
    generated = Segment(kind="generated", token_ids=tokens, logprobs=logprobs, version=version, lineage=1, replica="r")
    sent = trajectory(segments=[Segment(kind="prompt", token_ids=[1]), generated], reward=reward)
    received = decode_as(Trajectory, encode(sent))
    assert same(received, sent)
    assert received.action_tokens == len(tokens)
    assert received.last_version == version


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_reward_outside_the_unit_interval_is_refused(reward: float) -> None:
    with pytest.raises(ValidationError, match="reward"):
        trajectory(reward=reward)
    body = trajectory().model_dump() | {"reward": reward}
    with pytest.raises(InvalidMessage, match="reward"):
        decode(msgpack.packb({"v": 1, "kind": "trajectory", "body": body}))


@pytest.mark.parametrize(
    "tokens",
    [None, [2**40], {"dtype": "i4", "shape": [None], "data": b""}, {"dtype": "i4", "shape": [2], "data": b"\x00"}],
    ids=["nothing", "too large", "no length", "too short"],
)
def test_an_array_that_is_none_is_a_bad_message(tokens: object) -> None:
    body = trajectory().model_dump()
    body["segments"][0]["token_ids"] = tokens
    with pytest.raises(InvalidMessage, match="token_ids"):
        decode(msgpack.packb({"v": 1, "kind": "trajectory", "body": body}))


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", InvalidMessage, "envelope"),
        (b"\x93\x01", InvalidMessage, "envelope"),
        (msgpack.packb([1, 2]), InvalidMessage, "exactly the keys"),
        (msgpack.packb({"v": 2, "kind": "lease", "body": {}}), UnknownMessage, "schema version 2"),
        (msgpack.packb({"v": 1, "kind": "leese", "body": {}}), UnknownMessage, "'leese'"),
        (msgpack.packb({"v": 1, "kind": ["lease"], "body": {}}), UnknownMessage, "\\['lease'\\]"),
        (msgpack.packb({"v": 1, "kind": "lease", "body": None}), InvalidMessage, "lease"),
        (encode(EXAMPLES["trajectory"])[:-1], InvalidMessage, "envelope"),
    ],
)
def test_damage_is_named(data: bytes, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        decode(data)


def test_the_wrong_kind_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="expected lease, got end_of_run"):
        decode_as(Lease, encode(EndOfRun(reason="x")))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "generated", "token_ids": [1]},
        {"kind": "prompt", "token_ids": [1], "version": 3},
        {"kind": "generated", "token_ids": [1, 2], "logprobs": [0], "version": 1, "lineage": 1, "replica": "r"},
        {"kind": "generated", "token_ids": [1], "logprobs": [np.nan], "version": 1, "lineage": 1, "replica": "r"},
        {"kind": "prompt", "token_ids": {"dtype": "i4", "shape": [2], "data": b"123"}},
        {"kind": "prompt", "token_ids": {"dtype": "f4", "shape": [1], "data": b"1234"}},
    ],
)
def test_an_inconsistent_segment_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Segment(**fields)


def test_a_message_cannot_be_changed() -> None:
    sent = trajectory()
    with pytest.raises(ValueError, match="read-only"):
        sent.segments[0].token_ids[0] = 7
    with pytest.raises(ValidationError, match="frozen"):
        sent.reward = 0.0  # type: ignore[misc]
