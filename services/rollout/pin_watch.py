"""A replica's side of a pinned evaluation (`singlestream.streams.pins`): hold the weights, and serve nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from services.rollout.weights import WeightKeeper
from singlestream.contracts import Lease
from singlestream.streams import LeaseConsumer
from singlestream.streams.pins import Pin

log = logging.getLogger(__name__)


class PinWatch:
    """Knows the pin as it was read last, and holds the weights while this replica is named in it.

    Args:
        consumer: this replica's side of the lease streams.
        weights: what is held.
    """

    def __init__(self, consumer: LeaseConsumer, weights: WeightKeeper) -> None:
        self.consumer, self.weights = consumer, weights
        self.pin: Pin | None = None

    @property
    def named(self) -> bool:
        """Whether this replica is asked to hold its weights."""
        return self.pin is not None and self.consumer.consumer in self.pin.replicas

    @property
    def held_for(self) -> str | None:
        """The job for which the weights are held and will not change; None also while a load is still under way."""
        return self.pin.job if self.pin is not None and self.named and self.weights.held_still else None

    @property
    def serves(self) -> bool:
        """Whether this replica takes the pinned evaluation's leases, and no others."""
        return self.named and self.pin is not None and self.pin.policy == self.weights.held

    async def look(self) -> None:
        """Read the pin."""
        self.pin = Pin.parse(await self.consumer.redis.get(self.consumer.keys.pin))

    async def follow(self, running: Iterable[Lease]) -> None:
        """Hold the weights or let them go, as the pin says. They stay while a pinned lease still runs."""
        hold = self.named or any(lease.pinned for lease in running)
        if hold != self.weights.holding:
            log.info("weights %s.%s are %s", *self.weights.held, "held for an evaluation" if hold else "followed again")
            await self.weights.hold(hold)

    def may_start(self, lease: Lease) -> bool:
        """Whether a lease may start here: any unpinned one, and a pinned one of the policy that is held."""
        return not lease.pinned or (self.weights.held_still and self.weights.held == (lease.version, lease.lineage))
