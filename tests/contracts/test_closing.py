"""The fast reading of posterior updates against the contract: both refuse the same, and read alike."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from singlestream.contracts import Closing, EndOfRun, PosteriorUpdate, decode, decode_closing, encode
from singlestream.contracts.message import MAX_VERSION
from singlestream.errors import ContractError

UPDATE = PosteriorUpdate(lease_id="train:5f3a9c01:17", prompt_id="a1", outcome="trained", reward=0.5, version=4, kl=0.1)


def by_contract(data: bytes) -> object:
    try:
        message = decode(data)
    except ContractError as error:
        return type(error), str(error)
    return Closing(**message.model_dump()) if isinstance(message, PosteriorUpdate) else message


def fast(data: bytes) -> object:
    try:
        return decode_closing(data)
    except ContractError as error:
        return type(error), str(error)


FIELDS: dict[str, list[Any]] = {
    "lease_id": ["evaluate:00000000:1", "train:5f3a9c01:17\n", "train:5f3a9c01:017", "", 3, b"train:5f3a9c01:17"],
    "prompt_id": ["", "é", b"a1", b"\xff", None],
    "outcome": ["stale", "failed", "scored", "cancelled", "won", None],
    "reward": [None, 0, 1, True, "0.5", -0.0, 1.0000001, math.nan, math.inf, [0.5]],
    "version": [None, 0, 4.0, 4.5, MAX_VERSION, MAX_VERSION + 1, 2**64 - 1, -1, True, "4"],
    "kl": [None, 0, math.inf, math.nan, -0.1, 1e308],
    "other": [1],
}


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in FIELDS.items()}))
def test_any_mixture_of_fields_reads_as_the_contract_says(changes: dict[str, Any]) -> None:
    data = msgpack.packb({"v": 1, "kind": "posterior_update", "body": {**UPDATE.model_dump(), **changes}})
    assert fast(data) == by_contract(data)


@given(st.integers(0, len(encode(UPDATE)) - 1), st.integers(0, 255), st.binary(max_size=3))
def test_damaged_bytes_read_as_the_contract_says(place: int, byte: int, tail: bytes) -> None:
    data = encode(UPDATE)
    for damaged in (data[:place] + bytes([byte]) + data[place + 1 :], data[:place] + tail, data + tail):
        assert fast(damaged) == by_contract(damaged)


@pytest.mark.parametrize("changes", [{"outcome": "failed"}, {"reward": None}, {"version": None}, {"kl": math.inf}])
def test_half_evidence_is_refused(changes: dict[str, Any]) -> None:
    data = msgpack.packb({"v": 1, "kind": "posterior_update", "body": {**UPDATE.model_dump(), **changes}})
    with pytest.raises(ContractError, match="posterior_update"):
        decode_closing(data)


def test_another_kind_is_read_as_it_is() -> None:
    assert decode_closing(encode(EndOfRun(reason="x"))) == EndOfRun(reason="x")
    assert decode_closing(encode(UPDATE)) == Closing(**UPDATE.model_dump())
