"""Mathematics with a Python interpreter, as the reference recipe poses it (SPO, arXiv 2509.13232)."""

from __future__ import annotations

from services.rollout.environments.code_blocks import CodeEnvironment

INSTRUCTIONS = """\
Work through the problem below one step at a time. Where a calculation helps, you may write Python:
put it between <code> and </code>, fenced like this:

<code>
```python
print(2 + 2)
```
</code>

The program is run in a sandbox and whatever it prints comes back to you between <interpreter> and </interpreter>.
Go on reasoning from there, and call it again as often as you need. The sandbox is stateless: every program starts
afresh, so import and define in each one what it uses, and print what you want to see.

*user question:*
{question}

Finish with the final answer in a box, written exactly as \\boxed{{your answer}}."""


class MathPython(CodeEnvironment):
    """The reference's task: one user message with instructions and problem, code tool, boxed answer."""

    name = "math_python"
    default_grader = "boxed_strict"

    def prompt(self, question: str) -> str:
        """Instructions around the problem."""
        return INSTRUCTIONS.format(question=question)
