"""What the nodes of a group share: one more replicated log, which any of them may open.

It is the group's own state machine: what resource names mean (rule 17), and who the members are.  Each member applies the same
commands in the same order, as its own acceptor learns them.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from txrpc._decision_log.port import LogError
from txrpc._group.acceptor import DiskTrouble, LocalAcceptor
from txrpc._group.peers import Peers
from txrpc._group.replica import NoQuorum, Replica
from txrpc._protocol.quorum.commands import Bind, ChangeView, Command, LogState
from txrpc._protocol.quorum.views import View
from txrpc.errors import Fenced

__all__ = ["SHARED", "SharedLog"]

SHARED: Final = "*"
"""The name of that log.  No node has it."""
_WAIT_S: Final = 3.0


class SharedLog:
    """See the module's docstring.  Thread-safe; may block."""

    def __init__(self, acceptor: LocalAcceptor, peers: Peers) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._replica = Replica(SHARED, acceptor, peers)
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, str]:
        """Return what the resource names mean, as far as it is known here, which may be a moment old."""
        with contextlib.suppress(DiskTrouble):
            self._known = self._learn().names
        return self._known

    def _learn(self) -> LogState:
        state = self._acceptor.state(SHARED).result()
        if state.view is not None:
            self._peers.adopt(state.view)
        return state

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> dict[str, str]:
        """See `DecisionLog.bind`; raises `LogError`."""
        with self._lock:
            return dict(self._say(lambda _: Bind(first, rebound)).names)

    def tend(self) -> None:
        """See `Replica.tend`.  Perhaps no member has this log open, and it has something to say: then this one opens it."""
        with self._lock, contextlib.suppress(Fenced, NoQuorum, DiskTrouble):  # it is tried again
            state = self._learn()
            if not self._replica.is_open and (
                not self._acceptor.votes(SHARED) or (state.moved < self._peers.view.number and self._is_due())
            ):
                self._open()
            if self._replica.is_open:
                self._replica.tend()

    def change_view(self, view: View) -> View:
        """Decide that *view* is the next one, and return the one that is: another member may have been faster.

        Raises `LogError` if it is not known whether it was decided.
        """

        def change(state: LogState) -> ChangeView:
            here = self._peers.view
            new = {name: dict(state.incarnations) for name in view.addresses if not here.knows(name)}
            return ChangeView(replace(view, born={**view.born, **new}))

        with self._lock:
            latest = self._say(change).view
        assert latest is not None
        self._peers.adopt(latest)
        return latest

    def _is_due(self) -> bool:
        """Return whether this member, and not another one, is to open the log now: chance, so that they do not all at once."""
        return random.random() < 1 / max(1, len(self._peers.view.addresses))

    def _say(self, command: Callable[[LogState], Command]) -> LogState:
        """Put the *command* for the log's state into it, and return what it makes; raises `LogError`."""
        until = time.monotonic() + _WAIT_S
        while True:
            try:
                self._open()
                ready = self._replica.wait(_WAIT_S)
                if not (ready and self._replica.propose(command(self._replica.state), _WAIT_S)):
                    raise LogError(f"the group has not agreed: {self._peers.too_few()}")
                self._replica.tend()
            except Fenced:  # another member had something to say meanwhile
                if time.monotonic() > until:
                    raise LogError("the other members open the group's log all the time") from None
                time.sleep(random.random() * 0.1)
            except NoQuorum as error:
                raise LogError(str(error)) from None
            else:
                return self._replica.state

    def _open(self) -> None:
        if not self._replica.is_open:
            self._replica.open(random.getrandbits(32), self._acceptor.name)
