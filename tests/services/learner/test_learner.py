from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from services.learner.background import Background
from services.learner.learner import Learner

PARTS = ("checkpoints", "_beside", "_publisher", "_log", "_observers", "_server", "link")


class Part:
    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self.closed = name, closed

    def close(self) -> None:
        self.closed.append(self.name)
        if self.name in ("checkpoints", "_log"):
            raise OSError(f"{self.name}: the disk is full")


def test_every_part_is_closed_whichever_fails() -> None:
    learner, closed = object.__new__(Learner), list[str]()
    for name in PARTS:
        setattr(learner, name, Part(name, closed))
    with pytest.raises(ExceptionGroup) as caught:
        learner.close()
    assert closed == list(PARTS), "what writes first, the connection last"
    assert [str(error).partition(":")[0] for error in caught.value.exceptions] == ["checkpoints", "_log"]


def test_the_resume_pointer_moves_behind_what_is_left_to_announce_close_and_log() -> None:
    """A resume does none of it again for the steps before its checkpoint."""
    learner, done, go = object.__new__(Learner), list[str](), threading.Event()
    learner._beside = Background("test")
    learner._beside.submit(lambda: done.append("announced and closed" if go.wait(20) else "never"))
    learner._log = SimpleNamespace(sync=lambda: done.append("logged"))  # type: ignore[assignment]
    learner.link = SimpleNamespace(streams=None, call=lambda _, what: done.append(what))  # type: ignore[assignment]
    threading.Timer(0.2, go.set).start()
    learner._point("step-00000001-aa", "0-0")
    assert done == ["announced and closed", "logged", "the resume pointer"]
    learner._beside.close()
