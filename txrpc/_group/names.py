"""What the nodes of a group share: one more replicated log, which any of them may open."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Mapping
from typing import Final

from txrpc._decision_log.port import LogError
from txrpc._group.acceptor import DiskTrouble, LocalAcceptor
from txrpc._group.peers import Peers
from txrpc._group.replica import NoQuorum, Replica
from txrpc._protocol.quorum.commands import Bind
from txrpc.errors import Fenced

__all__ = ["SHARED", "SharedNames"]

SHARED: Final = "*"
"""The name of that log.  No node has it."""
_WAIT_S: Final = 3.0


class SharedNames:
    """What resource names mean, for all nodes of the group (rule 17): one more replicated log, which any member may open.

    Thread-safe; may block.
    """

    def __init__(self, acceptor: LocalAcceptor, peers: Peers) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._replica = Replica(SHARED, acceptor, peers)
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, str]:
        """Return what is known here, which may be a moment old."""
        with contextlib.suppress(DiskTrouble):
            self._known = self._acceptor.state(SHARED).result().names
        return self._known

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> dict[str, str]:
        """See `DecisionLog.bind`; raises `LogError`."""
        with self._lock:
            until = time.monotonic() + _WAIT_S
            while True:
                try:
                    return self._bind(Bind(first, rebound))
                except Fenced:  # another member had something to say meanwhile
                    if time.monotonic() > until:
                        raise LogError("the other members open the group's log all the time") from None
                    time.sleep(random.random() * 0.1)
                except NoQuorum as error:
                    raise LogError(str(error)) from None

    def tend(self) -> None:
        """See `Replica.tend`.  Perhaps no member has this log open: one whose disk is to be admitted opens it itself."""
        with self._lock, contextlib.suppress(Fenced, NoQuorum):  # it is tried again
            if not self._acceptor.votes(SHARED):
                self._open()
            if self._replica.is_open:
                self._replica.tend()

    def _bind(self, command: Bind) -> dict[str, str]:
        self._open()
        if not (self._replica.wait(_WAIT_S) and self._replica.propose(command, _WAIT_S)):
            raise LogError(f"what the resource names mean was not written: {self._peers.too_few()}")
        self._replica.tend()
        return dict(self._replica.state.names)

    def _open(self) -> None:
        if not self._replica.is_open:
            self._replica.open(random.getrandbits(32), self._acceptor.name)
