"""How many replicas are wanted."""

from __future__ import annotations

from typing import Any

import pytest

from services.rollout.scaling import replicas_wanted


def node(slots: float | None = 1.0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": 8.0} | ({} if slots is None else {"rollout_slot": slots})}


@pytest.mark.parametrize(
    ("nodes", "cap", "wanted"),
    [
        ([], None, 0),
        ([node()], None, 1),
        ([node(), node()], None, 2),
        ([node(4.0), node(2.0)], None, 6),
        ([node(), node(alive=False)], None, 1),
        ([node(), node(None)], None, 1),
        ([node(), node(), node()], 2, 2),
        ([node()], 5, 1),
        ([node()], 0, 0),
        ([node(0.5), node(0.4)], None, 0),
    ],
)
def test_replicas_fill_the_living_nodes_under_the_cap(
    nodes: list[dict[str, Any]], cap: int | None, wanted: int
) -> None:
    assert replicas_wanted(nodes, "rollout_slot", cap) == wanted
