"""Mathematical equality in child processes: right answers, and nothing that hangs."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.rollout.graders import Response, apply_grader, load_grader
from services.rollout.math_pool import MathPool, integers_equal, shared_pool

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[MathPool]:
    pool = MathPool(processes=1, deadline_s=10.0)
    yield pool
    await pool.close()


@pytest.mark.parametrize(
    ("truth", "answer", "equal"),
    [
        ("\\frac{1}{2}", "1/2", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("\\frac{1}{2}", "\\frac{1}{3}", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2,1)", False),
        ("23", "023", True),
        ("23", "24", False),
        ("-7", "+7", False),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("42", "forty-two", False),
        ("42", "", False),
    ],
)
async def test_equality(pool: MathPool, truth: str, answer: str, equal: bool) -> None:
    assert await pool.equal(truth, answer) is equal


async def test_a_comparison_that_hangs_is_killed_and_the_pool_goes_on() -> None:
    pool = MathPool(processes=1, deadline_s=10.0)
    assert await pool.equal("\\frac12", "0.5")
    frozen = pool._idle.get_nowait()
    assert frozen is not None
    frozen.send_signal(signal.SIGSTOP)
    pool._idle.put_nowait(frozen)
    pool.deadline_s = 0.5
    assert not await pool.equal("\\frac12", "0.5")
    assert pool.timeouts == 1
    pool.deadline_s = 10.0
    assert await pool.equal("\\frac12", "0.5")
    await pool.close()


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "\\" * 1500, "{" * 1500, "1" * 1999, "\x00", "\n"])
async def test_what_a_policy_may_write_does_no_harm(pool: MathPool, answer: str) -> None:
    assert await pool.equal("\\frac12", answer) is False
    assert await pool.equal("\\frac12", "0.5") is True


async def test_as_a_grader() -> None:
    grader = load_grader("math_verify")
    assert await apply_grader(grader, Response("?", "\\frac12", "", "so \\boxed{0.5}")) == 1.0
    assert await apply_grader(grader, Response("?", "\\frac12", "", "so 0.5")) == 0.0
    await shared_pool().close()


async def test_integers_are_compared_at_once() -> None:
    assert integers_equal("23", " 023 ") is True
    assert integers_equal("23", "2.3") is None
    assert integers_equal("1" * 5000, "1") is False
