"""Exact drift: how far the policy has moved on a prompt's previous response (the D of ``kl`` retention).

Every trained response of a chosen prompt is kept with the log-probs that the policy had just before its update, as the
prompt's anchor. When the next response of the prompt is about to be trained, D = mean |Δ log p| over the anchor's
action tokens, between the policy now and then: the same moment of both steps. The reference recipe measures both after
their update instead; the distance is between the same number of updates.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from services.learner.policy import Policy
from services.learner.samples import Sample

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Anchor:
    """A kept response.

    Args:
        step: the learner's step whose weights scored it.
        z: drift clock at that step.
        sample: the response; its ``behaviour_T`` holds the log-probs kept.
    """

    step: int
    z: float
    sample: Sample

    def pack(self) -> bytes:
        """As it stands in Redis: compressed msgpack, about 4 bytes a token of its log-probs and 2 of the rest."""
        sample = self.sample
        fields = (
            self.step, self.z, sample.lease_id, sample.prompt_id, sample.tokens,
            sample.token_ids_T.astype("<i4").tobytes(), np.packbits(sample.action_T).tobytes(),
            sample.behaviour_T[sample.action_T].astype("<f4").tobytes(),
        )  # fmt: skip
        return zlib.compress(msgpack.packb(fields, use_bin_type=True), 1)

    @classmethod
    def unpack(cls, data: bytes) -> Anchor:
        """Inverse of `pack`, of what is needed to score it again."""
        step, z, lease_id, prompt_id, tokens, ids, actions, logprobs = msgpack.unpackb(zlib.decompress(data))
        action_T = np.unpackbits(np.frombuffer(actions, np.uint8), count=tokens).astype(bool)
        behaviour_T = np.zeros(tokens, np.float32)
        behaviour_T[action_T] = np.frombuffer(logprobs, "<f4")
        sample = Sample(
            lease_id=lease_id,
            prompt_id=prompt_id,
            reward=0.0,
            v_hat=0.5,
            token_ids_T=np.frombuffer(ids, "<i4").astype(np.int64),
            action_T=action_T,
            mask_T=action_T,
            behaviour_T=behaviour_T,
            staleness_T=np.zeros(tokens, np.int32),
            first_version=step,
            last_version=step,
            policy_versions=1,
            tool_calls=0,
            prompt_tokens=0,
        )
        return cls(step, z, sample)


@dataclass(frozen=True)
class ExactDrift:
    """What `measure` found.

    Args:
        drift_N: D of each trajectory of the batch, nats; None where its prompt has no anchor.
        clock_N: what the drift clock says of the same span, in the same unit.
        kept: anchors to be, of this batch's trajectories.
    """

    drift_N: list[float | None]
    clock_N: list[float | None]
    kept: list[Anchor]

    def means(self) -> dict[str, float | int | None]:
        """Fields of ``steps.jsonl``: how many were measured, and both means over them."""
        pairs = [
            (exact, clock)
            for exact, clock in zip(self.drift_N, self.clock_N, strict=True)
            if exact is not None and clock is not None
        ]
        exact, clock = (float(np.mean(column)) for column in zip(*pairs, strict=True)) if pairs else (None, None)
        return {"anchors": len(pairs), "drift_exact": exact, "drift_clock": clock}


def logprobs_of(policy: Policy, samples: Sequence[Sample]) -> list[Floats]:
    """The log π of each sample's action tokens, without gradient, the same on every rank. Collective."""
    micro_batches = policy.micro_batches(samples)
    ends = np.cumsum([sample.action_tokens for sample in samples])
    flat_A = torch.zeros(int(ends[-1]), dtype=torch.float64)
    for micro, scores_A in zip(micro_batches, policy.logprobs(micro_batches), strict=True):
        rows_A, values_A = micro.row_A.cpu(), scores_A.double().cpu()
        for row, index in enumerate(micro.samples):
            flat_A[ends[index] - samples[index].action_tokens : ends[index]] = values_A[rows_A == row]
    policy.ranks.sum(flat_A)
    return np.split(flat_A.numpy().astype(np.float32), ends[:-1])


def measure(
    policy: Policy,
    samples: Sequence[Sample],
    anchors: Sequence[Anchor | None],
    keep_N: Sequence[bool],
    step: int,
    z: float,
) -> ExactDrift:
    """Score the anchors and the responses to be kept in one pass, before the batch is trained. Collective.

    Args:
        policy: the policy under training.
        samples: the batch.
        anchors: of each one's prompt.
        keep_N: whether each is to be kept.
        step: the learner's steps so far.
        z: the drift clock now.
    """
    # after a resume the store may hold the anchor that the very steps left which are now taken again
    before = [anchor if anchor is not None and anchor.step < step else None for anchor in anchors]
    # members of a group share their prompt's anchor: it is scored once
    measured = list({anchor.sample.lease_id: anchor for anchor in before if anchor is not None}.values())
    kept = [sample for sample, keep in zip(samples, keep_N, strict=True) if keep and sample.action_tokens]
    if not measured and not kept:
        return ExactDrift([None] * len(samples), [None] * len(samples), [])
    scores = logprobs_of(policy, [*(anchor.sample for anchor in measured), *kept])
    drifts = {anchor.sample.lease_id: _mean_shift(anchor, now) for anchor, now in zip(measured, scores, strict=False)}
    d_half = policy.settings.d_half
    return ExactDrift(
        drift_N=[None if anchor is None else drifts[anchor.sample.lease_id] for anchor in before],
        clock_N=[None if anchor is None else (z - anchor.z) * d_half for anchor in before],
        kept=[
            Anchor(step, z, _with_logprobs(sample, logprobs))
            for sample, logprobs in zip(kept, scores[len(measured) :], strict=True)
            if np.isfinite(logprobs).all()
        ],
    )


def _mean_shift(anchor: Anchor, now_A: Floats) -> float | None:
    """Mean |Δ log p|; None where it is not finite."""
    then_A = anchor.sample.behaviour_T[anchor.sample.action_T]
    shift = float(np.abs(now_A.astype(np.float64) - then_A).mean())
    return shift if np.isfinite(shift) else None


def _with_logprobs(sample: Sample, logprobs_A: Floats) -> Sample:
    behaviour_T = np.zeros(sample.tokens, np.float32)
    behaviour_T[sample.action_T] = logprobs_A
    return replace(sample, behaviour_T=behaviour_T)
