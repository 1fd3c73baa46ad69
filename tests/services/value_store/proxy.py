"""A proxy between store and Redis that loses one reply of every kind of command: it runs, its sender never hears."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re

from singlestream.streams import ledger

COMMAND = re.compile(rb"\*\d+\r\n\$\d+\r\n([A-Za-z]+)\r\n(?:\$\d+\r\n([^\r\n]{1,60})\r\n)?")
SCRIPTS = {
    hashlib.sha1(getattr(ledger, name).encode()).hexdigest(): name  # noqa: S324  Redis' own name for a script
    for name in ("ISSUE", "COMMIT", "CANCEL", "END_TRAINING", "TIDY")
}


def kind_of(data: bytes) -> str | None:
    """The command that a request starts with, by script for EVALSHA; None in the middle of one."""
    found = COMMAND.match(data)
    if found is None:
        return None
    name = found[1].decode().upper()
    if name == "EVAL":
        return "TAKE_OVER"  # the one script that is sent whole
    if name == "EVALSHA":
        return SCRIPTS.get((found[2] or b"").decode(), name)
    return name


class LossyProxy:
    """Listens on a port of loopback; each kind of command loses the reply of its ``lose_nth`` appearance."""

    def __init__(self, socket: str, lose_nth: int) -> None:
        self.socket, self.lose_nth = socket, lose_nth
        self.seen: dict[str, int] = {}
        self.lost: list[str] = []
        self.armed = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self.socket)
        back = asyncio.create_task(self._copy(upstream_reader, writer))
        try:
            while data := await reader.read(1 << 20):
                losing = self._loses(data)
                if losing is not None:
                    back.cancel()
                    await asyncio.gather(back, return_exceptions=True)
                upstream_writer.write(data)
                await upstream_writer.drain()
                if losing is not None:
                    await upstream_reader.read(1)  # it has run
                    self.lost.append(losing)
                    return
        except ConnectionError:
            pass
        finally:
            back.cancel()
            for one in (writer, upstream_writer):
                one.close()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await one.wait_closed()
            self._tasks.discard(task)

    def _loses(self, data: bytes) -> str | None:
        kind = kind_of(data)
        if kind is None or not self.armed:
            return None
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return kind if self.seen[kind] == self.lose_nth else None

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                writer.write(data)
                await writer.drain()
