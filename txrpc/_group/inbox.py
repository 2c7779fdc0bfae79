"""The answers that one proposer waits for, and the time that passes meanwhile."""

from __future__ import annotations

import contextlib
import queue
import time

from txrpc._protocol.quorum.acceptor import Answer

__all__ = ["Inbox"]


class Inbox:
    """See the module's docstring.  Any thread may put answers in; one takes them out."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def put(self, answer: Answer) -> None:
        """Put in an answer."""
        self._answers.put(answer)

    def get(self, timeout_s: float) -> Answer | None:
        """Return the next answer; None if none comes within that time, which may be negative."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait()
        return None

    def now_s(self) -> float:
        """Return a time that only grows."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let that time pass."""
        time.sleep(seconds)
