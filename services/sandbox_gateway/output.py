"""Keeps the head and the tail of a stream of any length in bounded memory."""

from __future__ import annotations

KILL_BYTES = 8 << 20
"""A stream this long gets its run killed (``output_limit``); up to it, output is read and dropped, so that a full pipe
blocks nobody.
"""


class HeadTail:
    r"""First and last bytes of a stream.

    Args:
        limit_bytes: bytes kept; the head gets the larger half.

    Example:
        >>> kept = HeadTail(4)
        >>> kept.feed(b"abcdefgh")
        >>> kept.text(), kept.total_bytes, kept.truncated
        ('ab\n… 4 bytes left out …\ngh', 8, True)
    """

    def __init__(self, limit_bytes: int) -> None:
        self._head_limit = limit_bytes - limit_bytes // 2
        self._tail_limit = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total_bytes = 0
        """Bytes fed so far."""

    @property
    def truncated(self) -> bool:
        """Whether bytes were left out."""
        return self.total_bytes > self._head_limit + self._tail_limit

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self.total_bytes += len(data)
        room = self._head_limit - len(self._head)
        self._head += data[:room] if room > 0 else b""
        rest = data[max(room, 0) :]
        if rest and self._tail_limit:
            self._tail += rest
            # Cut in large steps: cutting at every feed would move the tail once per line of output.
            if len(self._tail) > 2 * self._tail_limit + 65_536:
                del self._tail[: -self._tail_limit]

    def text(self) -> str:
        """What is kept, as text.

        Invalid UTF-8 becomes U+FFFD; a line between head and tail says how much is missing.
        """
        if not self.truncated:
            return (self._head + self._tail).decode("utf-8", "replace")
        tail = self._tail[-self._tail_limit :] if self._tail_limit else bytearray()
        missing = self.total_bytes - len(self._head) - len(tail)
        # A character cut in two at the seam is part of what is missing.
        head_text = (
            self._head.decode("utf-8", "ignore") if _is_cut(self._head) else self._head.decode("utf-8", "replace")
        )
        start = next((i for i, byte in enumerate(tail[:4]) if byte & 0xC0 != 0x80), len(tail) if len(tail) < 4 else 0)
        return f"{head_text}\n… {missing} bytes left out …\n{tail[start:].decode('utf-8', 'replace')}"


def _is_cut(data: bytearray) -> bool:
    """Whether the data are valid UTF-8 but for an unfinished character at the end."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.end == len(data)
    return False
