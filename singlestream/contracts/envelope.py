"""The envelope of every message on a stream: msgpack of ``{v, kind, body}``.

>>> from singlestream.contracts.trajectory import EndOfRun
>>> decode(encode(EndOfRun(reason="done")))
EndOfRun(reason='done')
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
from pydantic import ValidationError

from singlestream.contracts.lease import Lease
from singlestream.contracts.message import Message
from singlestream.contracts.policy_version import PolicyVersion
from singlestream.contracts.posterior_update import PosteriorUpdate
from singlestream.contracts.trajectory import EndOfRun, Tombstone, Trajectory
from singlestream.errors import InvalidMessage, UnknownMessage

SCHEMA_VERSION = 1
_ENVELOPE = {"v", "kind", "body"}
MAX_BYTES = 64 * 1024 * 1024
"""Largest message taken: a trajectory of 32k tokens has about 300 KB."""

KINDS: dict[str, type[Message]] = {
    "lease": Lease,
    "trajectory": Trajectory,
    "tombstone": Tombstone,
    "end_of_run": EndOfRun,
    "posterior_update": PosteriorUpdate,
    "policy_version": PolicyVersion,
}
_NAMES = {cls: kind for kind, cls in KINDS.items()}

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Pack a message. Raises KeyError for a class that is not in `KINDS`."""
    envelope = {"v": SCHEMA_VERSION, "kind": _NAMES[type(message)], "body": message.model_dump()}
    return bytes(msgpack.packb(envelope, use_bin_type=True))


def _open(data: bytes) -> tuple[str, Any]:
    """Kind and body of an envelope."""
    if len(data) > MAX_BYTES:
        raise InvalidMessage(f"a message of {len(data)} bytes is over the limit of {MAX_BYTES}")
    try:
        envelope = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise InvalidMessage(f"not a msgpack envelope: {error}") from error
    if not isinstance(envelope, dict) or envelope.keys() != _ENVELOPE:
        raise InvalidMessage("an envelope has exactly the keys v, kind and body")
    version, kind = envelope["v"], envelope["kind"]
    if version != SCHEMA_VERSION:
        raise UnknownMessage(f"schema version {version!r}; this build speaks {SCHEMA_VERSION}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnknownMessage(f"kind {kind!r}; known: {', '.join(KINDS)}")
    return kind, envelope["body"]


def decode(data: bytes) -> Message:
    """Unpack and validate a message.

    Raises:
        UnknownMessage: the kind or the schema version is not known here.
        InvalidMessage: the bytes are no envelope, or the body does not keep its contract.
    """
    kind, body = _open(data)
    try:
        return KINDS[kind].model_validate(body)
    except ValidationError as error:
        raise InvalidMessage(f"{kind}: {error}") from error


def decode_as(expected: type[M], data: bytes) -> M:
    """`decode`, and refuse any kind but ``expected``. Raises `UnknownMessage` or `InvalidMessage`."""
    message = decode(data)
    if not isinstance(message, expected):
        raise InvalidMessage(f"expected {_NAMES[expected]}, got {_NAMES[type(message)]}")
    return message
