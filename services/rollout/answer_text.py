"""The text of an answer while its tokens still come: only what later tokens can no longer change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CUT_CHARACTER = "\ufffd"
"""What a decoder writes for a character of which a part is still to come."""
MAX_CUT_TOKENS = 3
"""A character has at most four bytes, and a token at least one."""


class AnswerText:
    """Decodes a growing answer and ends it before the stop string that is complete first.

    What `add` returns, joined, is the same however the tokens are cut into parts. Each part is decoded with the one
    before it alone, so the work grows with the answer's length and not with its square.

    Args:
        decode: the tokenizer's, special tokens left out.
        stops: strings before which the text ends, none of them empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self._before: list[int] = []
        self._new: list[int] = []
        self._held = ""
        self._stopped = False

    def add(self, token_ids: Sequence[int], last: bool) -> str:
        """Take the next tokens.

        Args:
            token_ids: [T] what has been sampled since.
            last: whether nothing follows: what was held back comes too.

        Returns:
            the text that is certain by now; may be empty.
        """
        if self._stopped:
            return ""
        self._new += token_ids
        self._held += self._decoded(last)
        places = [(self._held.find(stop), len(stop)) for stop in self._stops]
        if found := [(place + length, place) for place, length in places if place >= 0]:
            self._stopped = True
            return self._held[: min(found)[1]]  # the one that is complete first, as the engine ends there
        sure = len(self._held) - (0 if last else self._begun())
        text, self._held = self._held[:sure], self._held[sure:]
        return text

    def _decoded(self, last: bool) -> str:
        """Text of the new tokens but for a cut character at their end.

        They are decoded together with those before, for a token alone may lose its leading space.
        """
        taken, text = len(self._new), self._decode(self._before + self._new)
        while not last and text.endswith(CUT_CHARACTER) and len(self._new) - taken < MAX_CUT_TOKENS:
            taken -= 1
            if taken <= 0:
                return ""
            text = self._decode(self._before + self._new[:taken])
        text = text[len(self._decode(self._before)) :]
        if text:  # special tokens have none, and nothing to begin with
            self._before = self._new[:taken]
        self._new = self._new[taken:]
        return text

    def _begun(self) -> int:
        """Length of the longest end of the text with which a stop string may begin."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
