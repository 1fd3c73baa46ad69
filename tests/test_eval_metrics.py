"""avg@k, maj@k and pass@k against values worked out by hand."""

from __future__ import annotations

import pytest

from singlestream.eval_metrics import Sampled, average, majority, majority_at, over_prompts, pass_at


def sampled(answers: str, truth: str = "a") -> Sampled:
    """A sample a letter; a dot has no answer."""
    told = [None if letter == "." else letter for letter in answers]
    return Sampled([float(one == truth) for one in told], told)


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        ("abbb", 1, 1 / 4),
        ("abbb", 2, 1 - 3 / 6),  # C(3,2)/C(4,2)
        ("abbb", 3, 1 - 1 / 4),
        ("abbb", 4, 1.0),
        ("aabb", 2, 1 - 1 / 6),
        ("bbbb", 4, 0.0),
        ("aaaa", 1, 1.0),
        ("aabbbbbb", 3, 1 - 20 / 56),
    ],
)
def test_pass_at_k(answers: str, k: int, expected: float) -> None:
    assert pass_at(sampled(answers), k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("aab", 1.0),
        ("abb", 0.0),
        ("ab", 0.5),
        ("abc", 1 / 3),
        ("aabbc", 0.5),
        ("a...", 1.0),
        ("....", 0.0),
        ("b..", 0.0),
    ],
)
def test_majority(answers: str, expected: float) -> None:
    one = sampled(answers)
    assert majority(one, range(len(answers))) == pytest.approx(expected)
    assert majority_at(one, len(answers)) == pytest.approx(expected)


def test_majority_of_one_sample_is_the_average() -> None:
    one = sampled("aaabbbbbbb")
    assert majority_at(one, 1) == pytest.approx(average(one), abs=0.1)


def test_majority_at_three_of_four() -> None:
    # subsets of aabb: {a,a,b} twice, {a,b,b} twice
    assert majority_at(sampled("aabb"), 3) == pytest.approx(0.5, abs=0.1)
    # subsets of aaab: {a,a,a} once, {a,a,b} three times
    assert majority_at(sampled("aaab"), 3) == 1.0


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        pass_at(sampled("aabb"), k)
    with pytest.raises(ValueError, match="samples"):
        majority_at(sampled("aabb"), k)


def test_over_prompts() -> None:
    prompts = [sampled("aaaa"), sampled("bbbb"), sampled("aabb"), sampled("aabb")]
    told = over_prompts(prompts, average)
    assert told.value == 0.5
    assert 0.0 <= told.low < 0.5 < told.high <= 1.0
    assert told == over_prompts(prompts, average)
    alone = over_prompts([sampled("aab")], average)
    assert alone.low == alone.value == alone.high == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no prompts"):
        over_prompts([], average)
