"""Arm a failpoint for a while: in a process that a test has started, or in the test's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from txrpc import _failpoints as failpoints
from txrpc.errors import ConfigurationError
from txrpc.testing.processes import Child

__all__ = ["Armed", "failpoint"]


class Armed:
    """A point that is armed.  Not thread-safe."""

    def __init__(self, name: str, action: str, process: Child | None) -> None:
        self.name = name
        self._action = action.partition("@")[0]
        self.process = process
        self._from = process.output.stat().st_size if process is not None and process.output.exists() else 0
        self._point: failpoints.Point | None = None

    @property
    def hit(self) -> bool:
        """Return whether it has done what it was armed with."""
        if self.process is None:
            return self._point is not None and self._point.done
        with self.process.output.open("rb") as output:
            output.seek(self._from)
            return f"failpoint {self.name}: ".encode() in output.read()

    def _stands_still(self) -> bool:
        """Whether the process is stopped, if it is to be: what it has written of that comes a moment before."""
        return self._action != "stop" or self.process is None or self.process.suspended

    def wait(self, timeout_s: float = 20.0) -> None:
        """Wait until it has; raises `TimeoutError`."""
        until = time.monotonic() + timeout_s
        while not self.hit or not self._stands_still():
            if time.monotonic() > until:
                raise TimeoutError(f"nothing came to the failpoint {self.name} in {timeout_s} s")
            time.sleep(0.02)


@contextmanager
def failpoint(name: str, action: str = "kill", *, process: Child | None = None) -> Iterator[Armed]:
    """Let code that comes to the point *name* do *action* instead of going on: see `txrpc._failpoints` for both.

    *process*, whether it runs already or is started later, has only this point armed until the end of the block.  Without one the
    point is this process's own, where it may only sleep or raise.

        with failpoint("coordinator.after_record", process=coordinator) as crash:
            future = pool.submit(place_order)
            crash.wait()          # decided, and no process has been told
        coordinator.wait()
        coordinator.start()
        assert future.result() == "placed"

    Raises `ConfigurationError` for a name or action that there is not.
    """
    armed = Armed(name, action, process)
    if process is not None:
        process.arm(f"{name}={action}")
        try:
            yield armed
        finally:
            process.arm("")
        return
    point = armed._point = failpoints.Point(name, action)
    if point.action in ("kill", "stop"):
        raise ConfigurationError(
            f"{name}={action} would {action} the test itself: give the process that it is meant for"
        )
    before = failpoints.program.points
    failpoints.program.points = {**before, name: point}
    try:
        yield armed
    finally:
        failpoints.program.points = before
