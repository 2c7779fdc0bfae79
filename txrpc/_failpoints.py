"""Named points at which a test can crash, freeze, delay or fail a real process.  Unless one is armed they do nothing.

    participant.after_prepare=kill         SIGKILL when the process gets there for the first time
    participant.after_prepare=kill@3       ... for the third time
    coordinator.before_record=stop         freeze (SIGSTOP)
    client.before_commit_request=sleep:2   wait two seconds
    coordinator.before_record=error        raise `FailpointError`

Several are separated by commas, in ``TXRPC_FAILPOINTS`` when the process starts.  ``TXRPC_FAILPOINTS=@FILE`` reads them from a file
instead, again whenever it changes: so a test arms a process that runs already.  A point that does something says so on standard
error.  Most tests want `txrpc.testing.failpoint`, which does all this.

A name is ``role.before_step`` or ``role.after_step``, where a step is a message that goes out (after: gRPC has taken it), an
operation in a database, a write of the log, or an end of a call of the application's.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from txrpc._environment import failpoints
from txrpc.errors import ConfigurationError

__all__ = [
    "MESSAGES",
    "POINTS",
    "STEPS",
    "FailpointError",
    "Point",
    "active",
    "failpoint",
    "parse",
    "passing",
    "program",
]

_FROM_BRANCHES = ("Voted", "Committing", "OnePhaseDone", "Acked", "Inquiry", "Resolved", "Trouble")
_TO_ROOTS = ("Welcome", "Takeover", "Tick", "OnePhaseToken", "OutcomeReply", "Votes", "GoAway")
_TO_BRANCHES = ("Prepare", "CommitOnePhase", "Commit", "Rollback", "Abandon", "Resolve")
MESSAGES: dict[str, tuple[str, ...]] = {
    "client": ("CommitRequest", "RollbackRequest", "OutcomeRequest"),
    "participant": ("Hello", *_FROM_BRANCHES, "Decided", "RegisterAnswer"),
    "coordinator": (*_TO_BRANCHES, *_TO_ROOTS, "Decide", "RegisterQuestion", "Registers", "DecisionDone"),
}
"""What each role sends."""

_OPERATIONS = ("prepare", "commit_one_phase", "rollback", "commit_prepared", "rollback_prepared", "one_phase_result")
STEPS: dict[str, tuple[str, ...]] = {
    "client": ("call",),
    "participant": ("reply", *_OPERATIONS, "decide", "insert_decision"),
    "coordinator": ("open", "record", "done"),
}
"""What else each role does."""

_ACTIONS = ("kill", "stop", "sleep", "error")


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


_ROLES = {name: role for role, names in MESSAGES.items() for name in names}

POINTS = frozenset(
    f"{role}.{when}_{step}"
    for role in MESSAGES
    for when in ("before", "after")
    for step in (*map(_snake, MESSAGES[role]), *STEPS[role])
)
"""All names."""


class FailpointError(RuntimeError):
    """What a point raises that is armed with ``error``."""


class Point:
    """One armed point.  Thread-safe."""

    def __init__(self, name: str, action: str) -> None:
        """Raises `ConfigurationError` for an unknown name or action."""
        if name not in POINTS:
            near = difflib.get_close_matches(name, POINTS, 1)
            hint = f": did you mean {near[0]}?" if near else ": the names are in docs/testing-your-services.md"
            raise ConfigurationError(f"there is no failpoint {name!r}{hint}")
        what, _, at = action.partition("@")
        self.action, _, seconds = what.partition(":")
        number = re.fullmatch(r"\d+(\.\d+)?", seconds)
        if (
            self.action not in _ACTIONS
            or bool(number) != (self.action == "sleep")
            or not re.fullmatch(r"[1-9]\d*|", at)
        ):
            raise ConfigurationError(
                f"failpoint {name}={action}: an action is kill, stop, error or sleep:SECONDS, with @N behind for the N-th time only"
            )
        self.name = name
        self._at = int(at or 1)
        self._seconds = float(seconds or 0)
        self._hits = 0
        self.done = False
        """Whether it has done what it was armed with."""
        self._lock = threading.Lock()

    def hit(self) -> None:
        """The program has come here.  Raises `FailpointError` if it is to."""
        with self._lock:
            self._hits += 1
            due = self._hits == self._at
        if not due:
            return
        self.done = True
        sys.stderr.write(f"failpoint {self.name}: {self.action}\n")
        sys.stderr.flush()
        if self.action == "sleep":
            time.sleep(self._seconds)
        elif self.action == "error":
            raise FailpointError(f"failpoint {self.name}")
        elif self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:  # a signal to the process may wait for another thread to wake up, while this one goes on
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def parse(text: str) -> dict[str, Point]:
    """The points that *text* arms, by name; raises `ConfigurationError`."""
    points = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, action = item.partition("=")
        if not equals:
            raise ConfigurationError(f"a failpoint is NAME=ACTION, not {item!r}")
        points[name] = Point(name, action)
    return points


class _Program:
    """What is armed in this process."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._read: tuple[int, int] | None = None
        self.points: dict[str, Point] = {}
        if self._file is None:
            self.points = parse(text)
        else:
            self.look()

    def look(self) -> None:
        """Read the file again if it has changed."""
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            if (stat.st_mtime_ns, stat.st_size) != self._read:
                self._read = stat.st_mtime_ns, stat.st_size
                self.points = parse(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.points = {}

    @property
    def active(self) -> bool:
        """Return whether anything is armed, or may be at any time."""
        return bool(self.points) or self._file is not None


program = _Program(failpoints())
"""For `txrpc.testing.failpoint`."""


def active() -> bool:
    """Return whether `failpoint` may do anything."""
    return program.active


def failpoint(name: str) -> None:
    """The program is at *name*.  Raises `FailpointError` if that is armed with ``error``."""
    if program.active:
        program.look()
        point = program.points.get(name)
        if point is not None:
            point.hit()


def passing(when: str, messages: Iterable[object]) -> None:
    """*messages* are about to go out (*when* is "before"), or have just gone ("after")."""
    for message in messages:
        name = type(message).__name__
        failpoint(f"{_ROLES[name]}.{when}_{_snake(name)}")
