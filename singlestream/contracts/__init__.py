"""The messages that the services exchange, and their encoding."""

from singlestream.contracts.closing import Closing, decode_closing
from singlestream.contracts.envelope import decode, decode_as, encode
from singlestream.contracts.lease import Lease, Progress, Purpose, Sampling
from singlestream.contracts.message import Message, group_of, lease_id, parse_lease_id
from singlestream.contracts.policy_version import PolicyVersion, RemoteWeights, TensorEntry, WeightDelta, WeightManifest
from singlestream.contracts.posterior_update import Outcome, PosteriorUpdate
from singlestream.contracts.trajectory import EndOfRun, EndReason, FailReason, Segment, Tombstone, ToolCall, Trajectory

__all__ = [
    "Closing",
    "EndOfRun",
    "EndReason",
    "FailReason",
    "Lease",
    "Message",
    "Outcome",
    "PolicyVersion",
    "PosteriorUpdate",
    "Progress",
    "Purpose",
    "RemoteWeights",
    "Sampling",
    "Segment",
    "TensorEntry",
    "Tombstone",
    "ToolCall",
    "Trajectory",
    "WeightDelta",
    "WeightManifest",
    "decode",
    "decode_as",
    "decode_closing",
    "encode",
    "group_of",
    "lease_id",
    "parse_lease_id",
]
