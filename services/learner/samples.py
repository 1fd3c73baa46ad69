"""A trajectory as the vectors that are trained on.

Axes: T tokens of one trajectory, prompt first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singlestream.contracts import Trajectory
from singlestream.errors import InvalidMessage

NOT_GENERATED = -1


@dataclass(frozen=True)
class Sample:
    """One trajectory at one step of the learner.

    Args:
        lease_id: the lease it ends.
        prompt_id: the prompt of that lease.
        reward: in [0, 1].
        v_hat: baseline frozen at the lease, in (0, 1).
        token_ids_T: int64.
        action_T: True where the policy sampled the token.
        mask_T: True where the token trains: an action of a segment young enough (I7, I11).
        behaviour_T: float32, the engine's log-prob of each action; 0 elsewhere.
        staleness_T: optimizer updates between sampling and this step; `NOT_GENERATED` elsewhere.
        first_version: policy version of the first generated segment.
        last_version: policy version of the last one.
        policy_versions: distinct (version, lineage) that sampled it.
        tool_calls: code blocks run.
        prompt_tokens: of the first segment.
    """

    lease_id: str
    prompt_id: str
    reward: float
    v_hat: float
    token_ids_T: NDArray[np.int64]
    action_T: NDArray[np.bool_]
    mask_T: NDArray[np.bool_]
    behaviour_T: NDArray[np.float32]
    staleness_T: NDArray[np.int32]
    first_version: int
    last_version: int
    policy_versions: int
    tool_calls: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt, generated and observed tokens."""
        return len(self.token_ids_T)

    @property
    def action_tokens(self) -> int:
        """Generated tokens, masks not applied."""
        return int(self.action_T.sum())

    @property
    def trained_tokens(self) -> int:
        """Generated tokens that train."""
        return int(self.mask_T.sum())


def to_sample(trajectory: Trajectory, step: int, staleness_bound: int) -> Sample:
    """Lay a trajectory's segments end to end.

    Args:
        trajectory: as the rollout emitted it.
        step: optimizer steps behind the weights that are about to be trained.
        staleness_bound: generated segments older than this many updates are masked (I11).
    """
    ids, actions, masks, behaviours, ages = [], [], [], [], []
    for segment in trajectory.segments:
        length = len(segment.token_ids)
        age = NOT_GENERATED if segment.version is None else max(0, step - segment.version)
        ids.append(segment.token_ids)
        actions.append(np.full(length, segment.version is not None))
        masks.append(np.full(length, NOT_GENERATED < age <= staleness_bound))
        behaviours.append(np.zeros(length, np.float32) if segment.logprobs is None else segment.logprobs)
        ages.append(np.full(length, age, np.int32))
    return Sample(
        lease_id=trajectory.lease_id,
        prompt_id=trajectory.prompt_id,
        reward=trajectory.reward,
        v_hat=trajectory.v_hat,
        token_ids_T=np.concatenate(ids).astype(np.int64),
        action_T=np.concatenate(actions),
        mask_T=np.concatenate(masks),
        behaviour_T=np.concatenate(behaviours),
        staleness_T=np.concatenate(ages),
        first_version=trajectory.first_version,
        last_version=trajectory.last_version,
        policy_versions=len({(s.version, s.lineage) for s in trajectory.segments if s.version is not None}),
        tool_calls=len(trajectory.tool_calls),
        prompt_tokens=len(trajectory.segments[0].token_ids),
    )


def check_scorable(trajectory: Trajectory, vocabulary: int, longest_tokens: int) -> None:
    """Check that this model can score a trajectory.

    Args:
        trajectory: as it came from the stream.
        vocabulary: rows of the model's embedding.
        longest_tokens: positions of the model.

    Raises:
        InvalidMessage: it is not of a training lease, or has tokens that this model has not.
    """
    if not trajectory.lease_id.startswith("train:"):
        raise InvalidMessage(f"{trajectory.lease_id} is no training lease")
    if len(trajectory.segments[0].token_ids) == 0:
        raise InvalidMessage(f"{trajectory.lease_id}: the prompt has no tokens, so its first action has no context")
    tokens = sum(len(segment.token_ids) for segment in trajectory.segments)
    if tokens > longest_tokens:
        raise InvalidMessage(f"{trajectory.lease_id}: {tokens} tokens; the model has {longest_tokens} positions")
    for segment in trajectory.segments:
        if len(segment.token_ids) and not 0 <= segment.token_ids.min() <= segment.token_ids.max() < vocabulary:
            raise InvalidMessage(f"{trajectory.lease_id}: a token is outside the vocabulary of {vocabulary}")
