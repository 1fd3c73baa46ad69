"""A `PosteriorUpdate` as the value store reads tens of thousands a second: the same contract at a tenth of the cost.

`decode_closing` takes at once what a typed msgpack decoder finds in order. Everything else it leaves to `decode`, which
alone decides what is refused, and why.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated, Literal

import msgspec

from singlestream.contracts.envelope import MAX_BYTES, decode
from singlestream.contracts.message import LEASE_ID_PATTERN, MAX_VERSION, Message
from singlestream.contracts.posterior_update import EVIDENCE, Outcome, PosteriorUpdate


class Closing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The fields of a `PosteriorUpdate`, which documents them."""

    lease_id: str
    prompt_id: str
    outcome: Outcome
    reward: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    version: Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)] | None = None
    kl: Annotated[float, msgspec.Meta(ge=0.0, le=sys.float_info.max)] | None = None


class _Envelope(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    v: Literal[1]
    kind: Literal["posterior_update"]
    body: Closing


_unpack = msgspec.msgpack.Decoder(_Envelope).decode
_is_lease_id = re.compile(LEASE_ID_PATTERN).fullmatch


def decode_closing(data: bytes) -> Closing | Message:
    """`decode`, with a `PosteriorUpdate` as a `Closing`. Raises `UnknownMessage` or `InvalidMessage` alike.

    >>> from singlestream.contracts import encode
    >>> update = PosteriorUpdate(lease_id="train:5f3a9c01:17", prompt_id="a1", outcome="trained", reward=1.0, version=4)
    >>> decode_closing(encode(update)).reward
    1.0
    """
    try:
        found = _unpack(data).body
    except ValueError:  # msgspec's errors, and text that is not UTF-8
        found = None
    if found is not None and len(data) <= MAX_BYTES and _is_lease_id(found.lease_id) and _is_complete(found):
        return found
    message = decode(data)
    return Closing(**message.model_dump()) if isinstance(message, PosteriorUpdate) else message


def _is_complete(found: Closing) -> bool:
    return (found.reward is not None) == (found.version is not None) == (found.outcome in EVIDENCE)
