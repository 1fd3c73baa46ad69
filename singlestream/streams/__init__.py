"""Everything that touches Redis: keys, scripts, and each service's side of the streams.

No other module knows a key or a script.
"""

from singlestream.streams.connection import LOST, connect, persist, wait_for_redis
from singlestream.streams.keys import GROUP, Keys
from singlestream.streams.leases import Held, LeaseConsumer, begun_later
from singlestream.streams.training import LearnerStreams, newest_version

__all__ = [
    "GROUP",
    "LOST",
    "Held",
    "Keys",
    "LearnerStreams",
    "LeaseConsumer",
    "begun_later",
    "connect",
    "newest_version",
    "persist",
    "wait_for_redis",
]
