"""Python between ``<code>`` and ``</code>``: every block of a turn is run, in order, and every output goes back."""

from __future__ import annotations

import re

from services.rollout.environments.base import Environment, Tools, Turn

CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)
FENCE = re.compile(r"\A\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
NO_BLOCK = "Error: </code> without <code>"


def code_blocks(text: str) -> list[str]:
    """Contents of all complete blocks, without a fence that encloses one; the code itself is never edited."""
    found = []
    for block in CODE.findall(text):
        fenced = FENCE.match(block)
        found.append(fenced.group(1) if fenced else block)
    return found


class CodeEnvironment(Environment):
    """An environment whose turns may call Python."""

    stop = ("</code>",)
    uses_sandbox = True
    observation = "\n<interpreter>\n{output}\n</interpreter>\n"
    """How one block's output is shown."""

    async def step(self, turn: Turn, tools: Tools) -> str | None:
        """Run the turn's blocks one after the other."""
        if turn.ended != "tool":
            return None
        outputs = [await tools.run(block) for block in code_blocks(turn.text)] or [NO_BLOCK]
        return "".join(self.observation.replace("{output}", output) for output in outputs)
