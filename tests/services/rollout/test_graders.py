"""Golden cases of the grading rules.

Sources: the reference recipe's rule, and verl's `is_correct_strict_box` for the windows and the balanced braces.
"""

from __future__ import annotations

import pytest

from services.rollout.graders import Response, boxed, boxed_strict, exact, last_boxed, load_grader
from singlestream.errors import ConfigError

THINK = "<think>six times seven</think>"
PAD = "x" * 400


def response(text: str, answer: str = "42", last_turn: str | None = None) -> Response:
    return Response("6*7=?", answer, text, text if last_turn is None else last_turn)


STRICT = [
    # the plain case, and what surrounds the box
    (f"{THINK}\\boxed{{42}}", "42", 1),
    (f"{THINK}The answer is \\boxed{{42}}.", "42", 1),
    (f"{THINK}\n\n**Answer:** $\\boxed{{42}}$\n", "42", 1),
    (f"{PAD}</think>\\boxed{{42}}", "42", 1),
    # exactly one </think>
    ("\\boxed{42}", "42", 0),
    (f"{THINK}{THINK}\\boxed{{42}}", "42", 0),
    ("</think></think>\\boxed{42}", "42", 0),
    ("</think>\\boxed{42}", "42", 1),
    ("</THINK>\\boxed{42}", "42", 0),
    ("< /think>\\boxed{42}", "42", 0),
    ("\\boxed{42}</think>", "42", 1),
    # tool tags: before </think> they are the work, after it they are not allowed
    ("<code>print(6*7)</code><interpreter>42</interpreter></think>\\boxed{42}", "42", 1),
    (f"{THINK}<code>print(42)</code>\\boxed{{42}}", "42", 0),
    (f"{THINK}<interpreter>42</interpreter>\\boxed{{42}}", "42", 0),
    (f"{THINK}\\boxed{{42}}<code>", "42", 0),
    (f"{THINK}\\boxed{{42}}</code>", "42", 1),
    (f"{THINK}\\boxed{{42}}</interpreter>", "42", 1),
    # the last box counts
    (f"{THINK}\\boxed{{41}} no, \\boxed{{42}}", "42", 1),
    (f"{THINK}\\boxed{{42}} no, \\boxed{{41}}", "42", 0),
    # exact strings
    (f"{THINK}\\boxed{{ 42}}", "42", 0),
    (f"{THINK}\\boxed{{42 }}", "42", 0),
    (f"{THINK}\\boxed{{42.0}}", "42", 0),
    (f"{THINK}\\boxed{{042}}", "42", 0),
    (f"{THINK}\\boxed{{023}}", "023", 1),
    (f"{THINK}\\boxed{{1/2}}", "\\frac{1}{2}", 0),
    (f"{THINK}\\boxed{{\\frac{{1}}{{2}}}}", "\\frac{1}{2}", 1),
    (f"{THINK}\\boxed{{\\dfrac{{1}}{{2}}}}", "\\frac{1}{2}", 0),
    (f"{THINK}\\boxed{{1,000}}", "1000", 0),
    (f"{THINK}\\boxed{{-7}}", "-7", 1),
    (f"{THINK}\\boxed{{−7}}", "-7", 0),
    (f"{THINK}\\boxed{{}}", "42", 0),
    (f"{THINK}\\boxed{{}}", "", 1),
    # braces
    (f"{THINK}\\boxed{{42", "42", 0),
    (f"{THINK}\\boxed{{42}} and \\boxed{{42", "42", 0),
    (f"{THINK}\\boxed{{{{42}}}}", "42", 0),
    (f"{THINK}\\boxed{{{{42}}}}", "{42}", 1),
    (f"{THINK}\\boxed{{\\{{1, 2\\}}}}", "\\{1, 2\\}", 1),
    (f"{THINK}\\boxed 42", "42", 0),
    (f"{THINK}\\fbox{{42}}", "42", 0),
    (f"{THINK}boxed{{42}}", "42", 0),
    (f"{THINK}Answer: 42", "42", 0),
    # the windows: the whole \boxed{…} within the last 100 characters
    (f"{THINK}\\boxed{{42}}" + "y" * 89, "42", 1),
    (f"{THINK}\\boxed{{42}}" + "y" * 90, "42", 1),
    (f"{THINK}\\boxed{{42}}" + "y" * 91, "42", 0),
    (f"{THINK}\\boxed{{42}}" + "y" * 300, "42", 0),
    (f"{THINK}\\boxed{{{'7' * 92}}}", "7" * 92, 1),
    (f"{THINK}\\boxed{{{'7' * 93}}}", "7" * 93, 0),
    ("", "42", 0),
    (THINK, "", 0),
]


@pytest.mark.parametrize(("text", "answer", "reward"), STRICT)
def test_boxed_strict(text: str, answer: str, reward: int) -> None:
    assert boxed_strict(response(text, answer)) == reward


def test_strict_reads_the_whole_response_not_the_last_turn() -> None:
    assert boxed_strict(response(f"{THINK}\\boxed{{42}}", last_turn="\\boxed{41}")) == 1


def test_boxed_needs_no_thinking_and_ignores_what_a_tool_printed() -> None:
    assert boxed(response("\\boxed{42}")) == 1
    assert boxed(response("<interpreter>\\boxed{42}</interpreter> done", last_turn=" done")) == 0


@pytest.mark.parametrize(
    ("text", "content"),
    [("\\boxed{a{b}c} \\boxed{d{e}}", "d{e}"), ("\\boxed{a} \\boxed{b", None), ("none", None), ("\\boxed{}", "")],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_a_grader_by_dotted_path() -> None:
    assert load_grader("operator:truth")(response("x")) is True


@pytest.mark.parametrize("name", ["no_such", "no.such.module:f", "operator:no_such", ":", ""])
def test_an_unknown_grader_is_a_setting_error(name: str) -> None:
    with pytest.raises(ConfigError, match="grader"):
        load_grader(name)


@pytest.mark.parametrize(
    ("turn", "reward"), [("42", 1), (" 42\n", 1), ("042", 0), ("42.", 0), ("It is 42", 0), ("", 0)]
)
def test_exact_takes_the_answer_and_nothing_else(turn: str, reward: int) -> None:
    assert exact(response("", last_turn=turn)) == reward
