"""Named points at which a test can crash, freeze or delay a real process.  Without ``TXRPC_FAILPOINTS`` they do nothing.

``TXRPC_FAILPOINTS="participant.after_prepare=kill"`` kills the process (SIGKILL) when it gets there for the first time;
``=kill@3`` at the third time; ``=stop`` freezes it (SIGSTOP); ``=sleep:1.5`` delays it by so many seconds, each time.  Several are
separated by commas.  A point that was hit is announced on standard error.

The points (the part after the dot is the operation or the message):

    client.before_commit_request   client.after_commit_request
    participant.before_*           participant.after_*            prepare, commit_one_phase, commit_prepared, rollback_prepared
    coordinator.before_record      coordinator.after_record
    coordinator.before_commit      (before a Commit is handed to a session)
    coordinator.before_reply       (before an outcome is handed to a session)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from txrpc.environment import failpoints
from txrpc.errors import ConfigurationError

__all__ = ["failpoint"]

_lock = threading.Lock()


class _Armed:
    def __init__(self, name: str, text: str) -> None:
        action, _, at = text.partition("@")
        self.action, _, seconds = action.partition(":")
        if self.action not in ("kill", "stop", "sleep"):
            raise ConfigurationError(
                f"TXRPC_FAILPOINTS: {name}={text}: an action is kill, stop or sleep:SECONDS, with @N behind"
            )
        self.name = name
        self.at = int(at or 1)
        self.seconds = float(seconds or 0)
        self.hits = 0

    def hit(self) -> None:
        with _lock:
            self.hits += 1
            due = self.action == "sleep" or self.hits == self.at
        if not due:
            return
        sys.stderr.write(f"failpoint {self.name}: {self.action}\n")
        sys.stderr.flush()
        if self.action == "sleep":
            time.sleep(self.seconds)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)


def _parse(text: str) -> dict[str, _Armed]:
    armed = {}
    for item in filter(None, text.split(",")):
        name, equals, action = item.strip().partition("=")
        if not equals:
            raise ConfigurationError(f"TXRPC_FAILPOINTS: {item!r} is not NAME=ACTION")
        armed[name] = _Armed(name, action)
    return armed


_armed = _parse(failpoints())


def failpoint(name: str) -> None:
    """The program is at *name*."""
    if _armed:
        point = _armed.get(name)
        if point is not None:
            point.hit()
