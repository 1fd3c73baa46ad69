from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.learner.micro_batches import lay_out
from services.learner.packing import Layout
from services.learner.samples import to_sample
from tests.services.learner.recorded import trajectory


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_responses_without_a_token(layout: Layout) -> None:
    """Beside others they are context for nothing; alone they are what a rank without work gets."""
    sample = to_sample(trajectory(1, np.random.default_rng(0)), 0, 4)
    nothing = np.zeros(sample.tokens, np.bool_)
    empty = replace(sample, action_T=nothing, mask_T=nothing)
    alone = lay_out([empty], [0], layout, torch.device("cpu"))
    assert (alone.samples, alone.mask_A.tolist()) == ([], [False])
    beside = lay_out([empty, sample], [0, 1], layout, torch.device("cpu"))
    assert beside.samples == [0, 1] and set(beside.row_A.tolist()) == {1}
    ids = beside.token_ids_BT.flatten()
    assert torch.equal(ids[beside.before_A + 1], beside.targets_A)
    assert torch.equal(beside.targets_A, torch.from_numpy(sample.token_ids_T[sample.action_T]))
