"""How many replicas there should be: as many as the nodes have room for, under a cap that changes while training runs.

Serve sees pulled work as idleness, so neither requests nor a backlog say anything; what counts is where a replica fits.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

REFRESH_S = 1.0
SLOT_RESOURCE = "rollout_slot"
"""Custom Ray resource: one for each replica that a node may hold."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Of a node. Weights and trajectories do not pass through Ray, so its object store stays small."""


def replicas_wanted(nodes: Iterable[Mapping[str, Any]], resource: str, cap: int | None) -> int:
    """Sum of a resource over the living nodes, at most ``cap``.

    Args:
        nodes: as ``ray.nodes()`` tells them: ``Alive`` and ``Resources`` of each.
        resource: custom resource of which a replica takes one.
        cap: most replicas wanted; None means no limit. 0 stops all.
    """
    room: int = math.floor(sum(node["Resources"].get(resource, 0.0) for node in nodes if node.get("Alive")))
    return room if cap is None else max(0, min(room, cap))


class FillNodes:
    """Serve's autoscaling policy: `replicas_wanted`, looked up apart from the controller's loop, not to block it.

    Args:
        resource: custom resource of which a replica takes one.
        redis_url: where the cap stands.
        cap_key: its key; a missing key means ``default_cap``.
        default_cap: cap until one is set; None means no limit.
        initial: replicas until the first look.
    """

    def __init__(self, resource: str, redis_url: str, cap_key: str, default_cap: int | None, initial: int) -> None:
        self.resource, self.redis_url, self.cap_key, self.default_cap = resource, redis_url, cap_key, default_cap
        self._wanted = initial
        threading.Thread(target=self._follow, name="fill-nodes", daemon=True).start()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Called by Serve's controller; returns (replicas, state)."""
        return self._wanted, {}

    def _follow(self) -> None:
        import ray
        import redis

        client = redis.Redis.from_url(self.redis_url, socket_timeout=5.0, socket_connect_timeout=5.0)
        while True:
            try:
                wanted = replicas_wanted(ray.nodes(), self.resource, self._cap(client.get(self.cap_key)))
                if wanted != self._wanted:
                    log.info("replicas wanted: %d, before %d", wanted, self._wanted)
                self._wanted = wanted
            except Exception as error:  # the boundary of a thread that must go on: the last answer stands meanwhile
                log.warning("cannot tell how many replicas are wanted: %s", error)
            time.sleep(REFRESH_S)

    def _cap(self, value: Any) -> int | None:
        return self.default_cap if value is None else int(value)
