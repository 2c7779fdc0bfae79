"""Changes of a group's members, one at a time, while its transactions run.

How to think of it
    What makes a change safe is in `txrpc._protocol.quorum.views`.  Here it is seen to that the group can bear it: that the change
    before it is complete in every log, that a member to come is there, and that those that stay are enough for the quorums to come
    without it, because its disk is empty.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from txrpc._decision_log.port import LogError
from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.disk import MEMBER
from txrpc._group.members import changed
from txrpc._group.peers import Peers
from txrpc._group.replica import NoQuorum, Replica
from txrpc._group.shared import SHARED, SharedLog
from txrpc._protocol.quorum.commands import LogState
from txrpc._protocol.quorum.views import Quorums, View
from txrpc.errors import ConfigurationError, Fenced

__all__ = ["Change", "GroupChanges", "TooFew", "logs_of"]

logger = logging.getLogger("txrpc.decision_log")

_PROBE_S: Final = 3.0
_LOOK_S: Final = 1.0
_BEFORE_S: Final = 5.0
_MOVE_S: Final = 15.0
_AGAIN_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator wants: members that come, with their addresses, or go, and other quorums; 0: as they follow."""

    come: Mapping[str, str] = field(default_factory=dict)
    go: Collection[str] = ()
    reads: int = 0
    writes: int = 0


class TooFew(ConfigurationError):
    """The group would stand still after the change: too few of those that stay would make a quorum."""


def logs_of(view: View) -> list[str]:
    """Return the names of all logs of a group."""
    return sorted({SHARED, *view.addresses, *view.former})


def _is_made(change: Change, view: View) -> bool:
    come = all(view.addresses.get(name) == address for name, address in change.come.items())
    go = all(name in view.former for name in change.go)
    return come and go and change.reads in (0, view.reads) and change.writes in (0, view.writes)


class GroupChanges:
    """See the module's docstring.  Thread-safe; blocks."""

    def __init__(self, acceptor: LocalAcceptor, peers: Peers, shared: SharedLog) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._shared = shared
        self._lock = threading.Lock()
        self._opened: dict[str, Replica] = {}
        """Logs that were opened here, because no node had: they move by what is done here, until their own node opens them."""

    @property
    def under_way(self) -> bool:
        """Return whether a change is being made here."""
        return self._lock.locked()

    def make(self, change: Change) -> View:
        """Decide *change*, and return the new view when every log has moved to it.

        One that comes for one that goes are two changes.
        Raises `ConfigurationError`, with nothing changed, if it is not possible or the group could not bear it; and `LogError` if
        it is not known whether it was decided, or not every log has moved yet: to ask again is safe.
        """
        with self._lock:
            if not (change.come and change.go):
                return self._make(change)
            coming, going = replace(change, go=()), replace(change, come={})
            try:
                self._make(coming)
            except TooFew:  # one that goes is dead: without it, fewer are needed
                self._make(going)
                return self._make(coming)
            return self._make(going)

    def _make(self, change: Change) -> View:
        now = self._peers.view
        if _is_made(change, now) and self.unmoved(now):  # it was asked for before, and its end was not waited for
            self._finish(now, _MOVE_S)
            return now
        following = changed(now, change.come, change.go, change.reads, change.writes)
        if now.number > 1:
            self._finish(now, _BEFORE_S)
        for name, address in following.addresses.items():
            if name not in now.addresses:
                self._greet(name, address)
        self._check_bearable(now, following)
        decided = self._shared.change_view(following)
        if replace(decided, born=following.born) != following:
            raise ConfigurationError(
                f"another change was made at the same time: the members are {', '.join(decided.names)} now; ask again"
            )
        logger.warning(
            "change of the group decided", extra={"view": decided.number, "members": ",".join(decided.names)}
        )
        self._finish(decided, _MOVE_S)
        return decided

    def unmoved(self, view: View) -> list[str]:
        """Return the logs of which not all is known to be on a quorum of *view* yet."""
        return [log for log in logs_of(view) if not self._moved(log, view)]

    def _finish(self, view: View, patience_s: float) -> None:
        """Wait until every log has moved to *view*; those move by themselves that are open anywhere."""
        until = time.monotonic() + patience_s
        while waiting := self.unmoved(view):
            if time.monotonic() > until:
                absent = f" ({self._peers.too_few()})" if self._peers.trouble else ""
                raise LogError(
                    f"the change to view {view.number} is still under way, the logs of {', '.join(waiting)} have not moved{absent}"
                )
            self._shared.tend()
            for replica in self._opened.values():
                with contextlib.suppress(Fenced):
                    replica.tend()
            time.sleep(_AGAIN_S)

    def _moved(self, log: str, view: View) -> bool:
        state = self._look(log, view.quorums)
        if state is None or state.moved >= view.number:
            return state is not None
        # One that was never opened is open nowhere, and moves by being opened.
        return not state.slot and view.number > 1 and self._open_for(log)

    def _look(self, log: str, quorums: Quorums) -> LogState | None:
        return Replica(log, self._acceptor, self._peers).look(quorums, _LOOK_S)

    def _open_for(self, log: str) -> bool:
        try:
            # In this node's name: one that opens it meanwhile is to see a takeover, and not a second process of its own name.
            replica = Replica(log, self._acceptor, self._peers)
            replica.open(random.getrandbits(32), self._acceptor.name)
        except (Fenced, NoQuorum) as error:
            logger.info("log not opened", extra={"log": log, "reason": str(error)})
            return False
        self._opened[log] = replica
        return True

    def _greet(self, name: str, address: str) -> None:
        """Raise `ConfigurationError` unless a coordinator waits at *address* to become a member."""
        reply = self._peers.probe(address, _PROBE_S)
        if reply.stage == MEMBER and reply.id != self._peers.group_id:
            raise ConfigurationError(
                f"the disk of {name!r} at {address} belongs to another group: begin with an empty one"
            )

    def _check_bearable(self, now: View, following: View) -> None:
        """Raise `TooFew` unless those that stay can decide in the next view before one that comes has its logs."""
        stay = tuple(name for name in now.names if name in following.addresses)
        needed = max(following.reads, following.writes)
        if needed > len(stay) or not self._all_answered(now, Quorums(stay, needed, len(stay), now.number)):
            raise TooFew(
                f"a group of {', '.join(following.names)} needs {needed} of the members that stay, with disks that vote, and has "
                f"not got them (replace or remove one that is dead first): {self._peers.too_few()}"
            )

    def _all_answered(self, view: View, quorums: Quorums) -> bool:
        """Return whether every log can be read: a member that came with the last change is let into one after the other."""
        until = time.monotonic() + _BEFORE_S
        while any(self._look(log, quorums) is None for log in logs_of(view)):
            if time.monotonic() > until or self._peers.trouble.keys() & quorums.acceptors:
                return False
        return True
