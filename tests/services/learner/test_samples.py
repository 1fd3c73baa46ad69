"""A trajectory as vectors, by hand: only what the policy sampled, and not too long ago, trains (I7, I11)."""

from __future__ import annotations

import numpy as np
import pytest

from services.learner.samples import NOT_GENERATED, check_scorable, to_sample
from singlestream.contracts import Segment, Trajectory
from singlestream.errors import InvalidMessage
from tests.contracts.messages import trajectory


def generated(ids: list[int], version: int, lineage: int = 1) -> Segment:
    logprobs = [-0.5 * one for one in ids]
    return Segment(kind="generated", token_ids=ids, logprobs=logprobs, version=version, lineage=lineage, replica="r")


def with_segments(*segments: Segment, **changes: object) -> Trajectory:
    return Trajectory.model_validate(trajectory().model_dump() | {"segments": list(segments)} | changes)


PROMPT = Segment(kind="prompt", token_ids=[1, 2])
TWO_TURNS = (
    PROMPT,
    generated([3, 4], version=4),
    Segment(kind="observation", token_ids=[5, 6, 7]),
    generated([8], version=5),
    generated([9], version=10),
)


def test_every_vector_by_hand() -> None:
    sample = to_sample(with_segments(*TWO_TURNS), step=9, staleness_bound=4)
    assert sample.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert np.flatnonzero(sample.action_T).tolist() == [2, 3, 7, 8]
    assert np.flatnonzero(sample.mask_T).tolist() == [7, 8], "version 4 is five updates old"
    assert sample.behaviour_T.tolist() == [0, 0, -1.5, -2.0, 0, 0, 0, -4.0, -4.5]
    none = NOT_GENERATED
    assert sample.staleness_T.tolist() == [none, none, 5, 5, none, none, none, 4, 0], "a newer version is not stale"
    assert (sample.tokens, sample.action_tokens, sample.trained_tokens, sample.prompt_tokens) == (9, 4, 2, 2)
    assert (sample.first_version, sample.last_version, sample.policy_versions) == (4, 10, 3)


def test_the_same_version_of_two_lineages_is_two_policies() -> None:
    sample = to_sample(with_segments(PROMPT, generated([3], 4), generated([5], 4, lineage=2)), 4, 4)
    assert sample.policy_versions == 2


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (with_segments(*TWO_TURNS, lease_id="evaluate:5f3a9c01:1"), "no training lease"),
        (with_segments(Segment(kind="prompt", token_ids=[]), generated([3], 4)), "no context"),
        (with_segments(PROMPT, generated([3, 4, 5, 6, 7, 8, 9, 9], 4)), "10 tokens; the model has 9 positions"),
        (with_segments(PROMPT, generated([3, 10], 4)), "outside the vocabulary of 10"),
        (with_segments(PROMPT, generated([3, -1], 4)), "outside the vocabulary of 10"),
    ],
)
def test_what_this_model_cannot_score_is_refused(one: Trajectory, why: str) -> None:
    with pytest.raises(InvalidMessage, match=why):
        check_scorable(one, vocabulary=10, longest_tokens=9)


def test_what_just_fits_is_scored() -> None:
    check_scorable(
        with_segments(*TWO_TURNS, Segment(kind="observation", token_ids=[])), vocabulary=10, longest_tokens=9
    )
