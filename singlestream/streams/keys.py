"""Every Redis key of a run, with its type and its one writer.

A stream entry has two fields: ``id`` (the lease's number, or empty) and ``m`` (the encoded message), so that an entry
whose message is damaged can still be attributed.
"""

from __future__ import annotations

from dataclasses import dataclass

from singlestream.contracts import Purpose

GROUP = "rollout"
"""The consumer group of every lease stream; created at 0, never at ``$``."""


@dataclass(frozen=True)
class Keys:
    """Keys of one run.

    Args:
        run: name of the run; the prefix of all of its keys is ``ss:<run>:``.
    """

    run: str

    def _key(self, *parts: str) -> str:
        return ":".join(("ss", self.run, *parts))

    def leases(self, purpose: Purpose) -> str:
        """Stream of leases to run. Written by the value store, and by replicas that hand over."""
        return self._key("leases", purpose)

    def results(self, purpose: Purpose) -> str:
        """Stream where a lease of that purpose ends."""
        return self.trajectories if purpose == "train" else self.scored

    @property
    def live(self) -> str:
        """Hash: lease number → the entry that holds it now. Whoever ends or moves a lease compares it."""
        return self._key("live")

    @property
    def trajectories(self) -> str:
        """Stream of training trajectories, tombstones and the end marker.

        Read by the learner with XRANGE, trimmed by it.
        """
        return self._key("trajectories")

    @property
    def scored(self) -> str:
        """Stream of estimation and evaluation results. Read and trimmed by the value store."""
        return self._key("results")

    @property
    def posterior_updates(self) -> str:
        """Stream of lease closings. Written by learner and replicas (failures), read and trimmed by the value store."""
        return self._key("posterior_updates")

    @property
    def policy_versions(self) -> str:
        """Stream of the newest published policy versions. Written and trimmed by the learner."""
        return self._key("policy_versions")

    @property
    def dead_letters(self) -> str:
        """Stream of messages that could not be used; fields ``source``, ``id``, ``reason``, ``m``."""
        return self._key("dead_letters")

    @property
    def clock(self) -> str:
        """Hash: policy version → z of the drift clock; the first write of a version wins."""
        return self._key("clock")

    @property
    def replicas(self) -> str:
        """Hash: replica → JSON {node, slots, in_use, version, lineage, pinned, at_s}: their demand, and who is alive.

        ``pinned`` is the evaluation for which a replica holds its weights, or null.
        """
        return self._key("replicas")

    @property
    def draining(self) -> str:
        """Hash: node → Unix time at which it was told to end; its replicas hand over. Gone when the node is.

        The hash expires, so that a mark which could not be taken away does not stay.
        """
        return self._key("draining")

    @property
    def pin(self) -> str:
        """String: the pinned evaluation under way (`singlestream.streams.pins.Pin`), or empty.

        Written by the value store.
        """
        return self._key("pin")

    @property
    def rollout_cap(self) -> str:
        """String: most replicas that the run may have. Written by the rollout service for ``singlestream scale``."""
        return self._key("rollout_cap")

    @property
    def learner(self) -> str:
        """String: JSON {step, state, waiting_for, at_s}: the learner's heartbeat."""
        return self._key("learner")

    @property
    def rollout_paused(self) -> str:
        """String, there while an operator has replicas take no leases. Written by the rollout service."""
        return self._key("rollout_paused")

    def fence(self, service: str) -> str:
        """String: token of the one process that may write as that service (I12)."""
        return self._key("fence", service)

    @property
    def lineage(self) -> str:
        """Counter: starts of the learner."""
        return self._key("lineage")

    @property
    def resume(self) -> str:
        """String: name of the checkpoint from which the learner resumes."""
        return self._key("resume")

    @property
    def prompts(self) -> str:
        """Hash: prompt id → msgpack of the prompt. Written by the value store."""
        return self._key("prompts")

    @property
    def values(self) -> str:
        """Hash: prompt id → packed posterior. Written by the value store."""
        return self._key("values")

    def history(self, prompt_id: str) -> str:
        """List: newest first, one msgpack record an update. Written by the value store."""
        return self._key("history", prompt_id)

    def outstanding(self, purpose: Purpose) -> str:
        """Hash: lease number → msgpack record of an open lease. Written by the value store."""
        return self._key("outstanding", purpose)

    @property
    def ledger(self) -> str:
        """Hash: ``<purpose>:leased`` and ``<purpose>:<outcome>`` → count. Written by the value store."""
        return self._key("ledger")

    @property
    def cursors(self) -> str:
        """Hash: stream → last entry applied, in the same transaction as its effect. Written by the value store."""
        return self._key("cursors")

    @property
    def jobs(self) -> str:
        """Hash: job id → msgpack of an estimation or evaluation job. Written by the value store."""
        return self._key("jobs")

    def job_results(self, job_id: str) -> str:
        """Hash: item number (prompt's place in the job × rewards per prompt + repetition) → msgpack of its result.

        Written by the value store.
        """
        return self._key("job_results", job_id)

    @property
    def calibration(self) -> str:
        """String: packed sums behind the Brier score and the reliability table. Written by the value store."""
        return self._key("calibration")

    @property
    def anchors(self) -> str:
        """Hash: lease → packed previous response (`singlestream.streams.anchors`). Written by the learner."""
        return self._key("anchors")

    @property
    def anchor_of(self) -> str:
        """Hash: prompt id → lease of its anchor. Written by the value store."""
        return self._key("anchor_of")

    @property
    def anchor_ages(self) -> str:
        """Sorted set: leases with an anchor, by the order in which they were written."""
        return self._key("anchor_ages")

    @property
    def anchor_counts(self) -> str:
        """Hash: ``bytes`` that all anchors take, ``written`` and ``evicted``: how many were."""
        return self._key("anchor_counts")

    @property
    def state(self) -> str:
        """String: what training does: paused, running, stopping, stopped or finished. Written by the value store."""
        return self._key("state")
