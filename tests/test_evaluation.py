"""From results to a report: failed samples count for nothing, and what cannot be measured is left out."""

from __future__ import annotations

import pytest

from singlestream.clients.value_store import JobResult
from singlestream.evaluation import benchmarks, sizes


def result(prompt: str, repetition: int, reward: float | None, answer: str | None = None) -> JobResult:
    return JobResult(
        prompt_id=prompt,
        repetition=repetition,
        lease_id=f"evaluate:0000abcd:{repetition + 1}",
        reward=reward,
        version=3,
        turns=1,
        tool_calls=1,
        action_tokens=5,
        response_tokens=10,
        answer=answer,
        end_reason="stop",
        failures=0 if reward is not None else 4,
    )


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])])
def test_sizes(n: int, expected: list[int]) -> None:
    assert sizes(n) == expected


def test_benchmarks_by_source() -> None:
    results = [
        *(result("a", i, float(i < 2), "7" if i < 2 else "8") for i in range(3)),  # 2 of 3, the majority is right
        *(result("b", i, reward, "9") for i, reward in enumerate([1.0, None, 0.0])),  # one failed
        *(result("c", i, 1.0) for i in range(3)),  # no box
        *(result("d", i, None) for i in range(3)),  # nothing at all
    ]
    first, second = benchmarks(results, {"a": "x", "b": "x", "c": "y", "d": "z"}, 3)
    assert (first.name, first.prompts, first.samples, first.failed) == ("x", 2, 5, 1)
    assert first.avg.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert first.pass_[2].value == pytest.approx(1.0)  # of a: 1 − C(1,2)/C(3,2); of b: two rewards, one right
    assert first.pass_[3].value == first.maj[3].value == 1.0  # of a alone: b has two rewards
    assert (first.response_tokens_mean, first.tool_calls_mean) == (10, 1)
    assert (second.name, second.maj) == ("y", {})
    assert second.avg.value == second.avg.low == second.avg.high == 1.0
    assert set(second.told()) >= {"avg", "maj", "pass"}
