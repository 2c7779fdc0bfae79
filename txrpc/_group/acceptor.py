"""This process's acceptor: a thread that takes questions from all sides, many at a time, and syncs once for all of them."""

from __future__ import annotations

import logging
import queue
import secrets
import sqlite3
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeAlias

from txrpc._decision_log.port import LogError
from txrpc._group.disk import DiskFile, Standing
from txrpc._protocol.quorum.acceptor import Answer, Disk, Question, answer
from txrpc._protocol.quorum.commands import LogState, Marker
from txrpc._protocol.quorum.views import View
from txrpc.errors import TxrpcError
from txrpc.ids import Epoch

__all__ = ["DiskTrouble", "LocalAcceptor", "blank"]

logger = logging.getLogger("txrpc.decision_log")

_BATCH_MAX = 500

_Work: TypeAlias = tuple[Callable[[], Any], str | None, "Future[Any]"]
"""What is to be done, the log that it changes, and who waits for the result."""


class DiskTrouble(LogError):
    """The disk did not take what an answer promises: there is no answer."""


class LocalAcceptor:
    """See the module's docstring.  All methods may be called from any thread, and none blocks."""

    def __init__(self, file: DiskFile) -> None:
        """Take over *file*.  Raises `ConfigurationError` if it is damaged."""
        self.name = file.name
        self._file = file
        self._disks = file.load()
        self.ready = False
        """Whether it may answer its peers: not before it is sure that its disk is not an older one."""
        self._stale = False
        """Whether the disks in memory are ahead of the file, because that took no more."""
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._view: dict[str, tuple[Epoch, str]] = {log: _shown(disk) for log, disk in self._disks.items()}
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="txrpc-acceptor", daemon=True)
        self._thread.start()

    @property
    def standing(self) -> Standing:
        """How far this disk has come."""
        return self._file.standing

    @property
    def saves(self) -> int:
        """How often the disk was written: what it says to others is never more than that."""
        return self._file.saves

    def heard(self) -> dict[str, tuple[int, int]]:
        """See `DiskFile.heard`; before anything else is asked."""
        return self._file.heard()

    def remember(self, heard: Mapping[str, tuple[int, int]]) -> Future[None]:
        """See `DiskFile.remember`."""
        return self._put(lambda: self._file.remember(heard), None)

    def kept_view(self) -> View | None:
        """Return who the group's members are, as far as this disk has heard of a change."""
        return self._file.view

    def keep_view(self, view: View) -> Future[None]:
        """See `DiskFile.keep_view`."""
        return self._put(lambda: self._file.keep_view(view), None)

    def distrust(self) -> Future[None]:
        """Treat the disk as a lost one, because it is older than what it has answered: its logs must admit it anew."""

        def become_another() -> None:
            held = self._file.standing
            standing = Standing(held.stage, held.group_id, 2 + secrets.randbits(62))
            for disk in self._disks.values():
                disk.incarnation, disk.votes = standing.incarnation, False
            self._file.save(self._disks.items(), standing)

        return self._put(become_another, None)

    def votes(self, log: str) -> bool:
        """Return whether its answers count in that log."""
        disk = self._disks.get(log)
        if disk is not None:
            return disk.votes
        return blank(self._file.view, log).counts(self.name, self._file.standing.incarnation)

    def view(self) -> dict[str, tuple[Epoch, str]]:
        """Return the latest epoch of each log that is known here, and the node that holds it."""
        return dict(self._view)

    def ask(self, log: str, question: Question) -> Future[Answer]:
        """Return what will have the answer, when it is on the disk; or `DiskTrouble`."""
        return self._put(lambda: answer(self._disk(log), question), log)

    def state(self, log: str) -> Future[LogState]:
        """Return what will have a copy of all that is chosen for certain in that log, as far as it is known here."""

        def copy() -> LogState:  # in the acceptor's thread
            return self._disk(log).base.copy()

        return self._put(copy, None)

    def stand(self, decide: Callable[[Standing], Standing]) -> Future[Standing]:
        """Let *decide* say from the disk's standing what it becomes, and return what will have that, when it is on the disk."""

        def become() -> Standing:
            standing = decide(self._file.standing)
            if standing != self._file.standing:
                self._file.stand(standing)
            return standing

        return self._put(become, None)

    def close(self) -> None:
        """Finish what was asked, and release the file.  Idempotent."""
        self._work.put(None)
        self._thread.join()
        self._file.close()

    # -------------------------------------------------------------------------------------------------------- thread

    def _put(self, verb: Callable[[], Any], log: str | None) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # the caller may give up waiting, and the work is done all the same
        self._work.put((verb, log, future))
        return future

    def _run(self) -> None:
        over = False
        while not over:
            batch: list[_Work] = []
            item = self._work.get()
            while item is not None:
                batch.append(item)
                if self._work.empty() or len(batch) >= _BATCH_MAX:
                    break
                item = self._work.get()
            over = item is None
            self._do(batch)

    def _do(self, batch: list[_Work]) -> None:
        """Take all of them, then sync, then answer: an answer that left before could promise what a crash takes back."""
        changed: dict[str, Disk] = {}
        done: list[tuple[Future[Any], Any]] = []
        try:
            if self._stale:
                self._disks = self._file.load()
                self._stale = False
            voting = {log for log, disk in self._disks.items() if disk.votes}
            for verb, log, future in batch:
                done.append((future, verb()))
                if log is not None:
                    changed[log] = self._disks[log]
            if changed:
                self._file.save(changed.items())
        except Exception as error:
            self._failed(error, batch)
            return
        if self._trouble:
            logger.info("disk works again", extra={"disk": self._file.path})
            self._trouble = ""
        for log, disk in changed.items():
            if disk.votes and log not in voting and disk.incarnation != 1:
                logger.info("disk admitted", extra={"log": log, "position": disk.base.position})
        self._view.update({log: _shown(disk) for log, disk in changed.items()})
        for future, result in done:
            future.set_result(result)

    def _failed(self, error: Exception, batch: list[_Work]) -> None:
        self._stale = True
        if not isinstance(error, sqlite3.Error | TxrpcError):
            logger.critical("acceptor failed", exc_info=error)
        reason = f"the disk file {self._file.path} does not work: {error}"
        if reason != self._trouble:
            logger.error("disk trouble", extra={"disk": self._file.path, "reason": str(error)})
            self._trouble = reason
        for _, _, future in batch:
            future.set_exception(DiskTrouble(reason))

    def _disk(self, log: str) -> Disk:
        disk = self._disks.get(log)
        if disk is None:
            incarnation, base = self._file.standing.incarnation, blank(self._file.view, log)
            votes = base.counts(self.name, incarnation)
            disk = self._disks[log] = Disk(self.name, incarnation, votes=votes, base=base)
        return disk


def blank(view: View | None, log: str) -> LogState:
    """Return the state of a log in which nothing has been written yet."""
    return LogState(incarnations=dict(view.born.get(log, {})) if view else {})


def _shown(disk: Disk) -> tuple[Epoch, str]:
    """The latest epoch that has opened the log, or has begun to."""
    begun = [slot.command for slot in disk.slots.values() if isinstance(slot.command, Marker)]
    return max([(disk.base.epoch, disk.base.holder), *((each.epoch, each.holder) for each in begun)])
