"""The demo's task: the bare question, for a model whose characters are its tokens."""

from __future__ import annotations

from services.rollout.environments.code_blocks import CodeEnvironment


class TinyTool(CodeEnvironment):
    """Code tool without instructions and without line breaks around its output."""

    name = "tiny_tool"
    observation = "<interpreter>{output}</interpreter>"

    def prompt(self, question: str) -> str:
        """The question as it is."""
        return question
