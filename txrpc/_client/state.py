"""What both clients hold, and how the effects of the participant's table are applied."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from txrpc._client.completion import LocalCommit
from txrpc._client.starting import Starting
from txrpc._client.using import OpenBranch
from txrpc._protocol.messages import (
    Outcome,
    OutcomeRequest,
    Owner,
    ToCoordinator,
    Trouble,
    Welcome,
)
from txrpc._protocol.participant.branch import BranchInput, Do, Effects, Operation
from txrpc._protocol.participant.machine import Participant
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    Reason,
    Unavailable,
)
from txrpc.ids import GROUP_MAX, RESOURCE_MAX, BranchId, ParticipantId, Xid, check_name

__all__ = ["FINISHING", "ClientState", "ManagerStatus", "SessionPort"]

logger = logging.getLogger("txrpc.client")


@dataclass(frozen=True, slots=True)
class ManagerStatus:
    """What a manager knows without asking anyone.

    coordinator: the node whose session is open, or None while there is no session.
    resources: by name, what keeps the resource from being used; "" if it is ready.
    """

    coordinator: str | None
    resources: Mapping[str, str]

    @property
    def ready(self) -> bool:
        """True if there is a session and every resource is ready."""
        return self.coordinator is not None and not any(self.resources.values())


class SessionPort(Protocol):
    """What a manager needs of `txrpc._grpc.session`; there are two: `start`, `close` and `wait_connected` block or are awaited."""

    start: Callable[[], Any]
    close: Callable[..., Any]
    wait_connected: Callable[..., Any]

    def send(self, node: str, *messages: ToCoordinator) -> None:
        """Queue for coordinator *node*; raises `CoordinatorUnavailable` when there is no session."""


class ClientState:
    """The table, the slots, the futures and the session; and how the table's effects are honoured."""

    patience_ms = 30_000
    start_patience_s = 10.0
    """For how long `start` waits for the databases; who has not answered by then is waited for in the background."""
    serves = False
    """Whether calls join transactions through this manager: then its resources are not used outside of them (rule 19)."""
    entropy: Callable[[int], bytes] = staticmethod(os.urandom)
    """As many random bytes: what identifiers are made of."""
    jitter: Callable[[], float] = staticmethod(random.random)
    """From 0 to 1: what spreads questions and repetitions."""

    def __init__(self, group: str, resources: Iterable[Any], process: str = "") -> None:
        self.group = check_name("group", group, GROUP_MAX)
        self.process = process or f"pid {os.getpid()}"
        self.participant_id = ParticipantId(self.entropy(8))
        self.resources: dict[str, Any] = {}
        for resource in resources:
            check_name("resource", resource.name, RESOURCE_MAX)
            if resource.name in self.resources:
                raise ConfigurationError(f"two resources are named {resource.name!r}: each needs a name of its own")
            self.resources[resource.name] = resource
            if hasattr(resource, "user"):
                resource.user = self
        self.welcome: Welcome | None = None
        self._starting = Starting(self.resources)
        self._announced = -1
        """The version of it that the coordinator was told."""
        self._start_at: dict[str, int] = {}
        self._session: SessionPort | None = None
        self._seen: Owner | None = None
        self._position = 0
        """The greatest position of that coordinator's log that was heard of (rule 18)."""
        self._tick = 0
        self._asker = ""
        """The coordinator whose message about a branch is being handled."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._table = Participant(self.jitter)
        self._slots: dict[BranchId, OpenBranch] = {}
        self._asking: dict[Xid, list[Any]] = {}
        self._ending: dict[BranchId, Any] = {}
        self._sweep_at: dict[str, int] = {}
        self._unknown: dict[Xid, tuple[str, OutcomeRequest]] = {}
        self._tokens: dict[Xid, str] = {}
        """How the ends can be learnt of those commits in one phase whose process was lost."""
        self._local: dict[Xid, LocalCommit] = {}

    # ------------------------------------------------------------------------------------------- what blocks or awaits

    def _start(self, do: Do, slot: OpenBranch | None) -> None:
        """Carry out an operation on a resource, elsewhere, and call `_operated` with its result."""
        raise NotImplementedError

    def _wake(self) -> None:
        """`next_wakeup_ms` may have moved forward."""
        raise NotImplementedError

    def _future(self) -> Any:
        raise NotImplementedError

    def _settle(self, future: Any, result: Any) -> None:
        """Set the result or the exception of a future that somebody may have given up."""
        raise NotImplementedError

    def _turn(self) -> Any:
        raise NotImplementedError

    def now_ms(self) -> int:
        """Monotonic time."""
        return time.monotonic_ns() // 1_000_000

    def unix_ms(self) -> int:
        """The machine's clock, in milliseconds since 1970: for people, no rule depends on it."""
        return time.time_ns() // 1_000_000

    def _session_or_raise(self) -> Any:
        if self._session is None:
            raise CoordinatorUnavailable("this manager has no coordinator")
        return self._session

    def _send(self, node: str, *messages: ToCoordinator) -> None:
        if self._session is None or self.welcome is None:
            raise CoordinatorUnavailable("there is no session with a coordinator")
        self._session.send(node, *messages)

    def _node_of(self, message: Any) -> str:
        """Which coordinator a message about a branch is for: its own; of a branch that is not known here, the one that asked."""
        if hasattr(message, "gid"):
            node: str = message.gid.node
            return node
        row = self._table.rows.get(message.branch)
        return row.gid.node if row is not None and row.xid == message.xid else self._asker

    # -------------------------------------------------------------------------------------------------------- effects

    def _apply(self, effects: Effects) -> None:
        """Called under the lock, so that messages about one branch leave in the order of the steps that made them."""
        for branch, result, reason in effects.settle:
            commit = self._local.get(self._table.rows[branch].xid) if branch in self._table.rows else None
            if commit is not None:
                commit.result = result
            future = self._ending.pop(branch, None)
            if future is not None:
                self._settle(future, (result, reason))
        for message in effects.send:
            if isinstance(message, Trouble) and message.reason is not None:
                logger.warning("%s (%s)", message.reason.text, message.gid)
        for mistake in effects.mistakes:
            logger.warning("protocol violation: %s", mistake)
        if effects.send:
            try:
                for node, messages in itertools.groupby(effects.send, self._node_of):
                    self._send(node, *messages)
            except Unavailable:  # no session, or more waits for it than it takes
                logger.debug("dropped %d messages: no session", len(effects.send))
        for do in effects.do:
            slot = self._slots.get(do.gid.branch)
            if do.operation in _NEEDS_WORK and (slot is None or slot.work is None):
                if do.operation is Operation.ROLLBACK:
                    self._operated(do, (BranchInput.ROLLED_BACK, None))
            else:
                self._start(do, slot)
        self._wake()

    def _operated(self, do: Do, result: tuple[BranchInput, Any]) -> None:
        """The result of an operation."""
        with self._lock:
            if do.operation in _ENDS_WORK:
                self._slots.pop(do.gid.branch, None)
            self._apply(self._table.step(result[0], do.gid.branch, self.now_ms(), result[1]))

    def _leaves_work(self, do: Do, slot: OpenBranch | None) -> bool:
        """Whether *do*, which failed in a way that nobody meant, may have left work open, with its locks and its connection."""
        return do.operation in _ENDS_WORK and slot is not None and slot.work is not None

    def _broke(self, do: Do, error: BaseException) -> None:
        """A resource broke its contract, or this program is mistaken: the branch must not wait for ever."""
        fields = {"operation": do.operation.value, "gid": str(do.gid)}
        logger.error("operation failed", extra=fields, exc_info=error)
        reason = Reason(AbortCode.UNSPECIFIED, f"{do.operation.value} failed: {type(error).__name__}")
        if do.operation is not Operation.INTERRUPT:
            kind = _BROKE.get(do.operation, BranchInput.FINISH_FAILED)
            detail = (Outcome.UNKNOWN, reason) if kind is BranchInput.ONE_PHASE_ENDED else reason
            self._operated(do, (kind, detail))

    def tell(self, node: str, message: ToCoordinator) -> None:
        """Send coordinator *node* a message that needs no answer; without a session it is dropped."""
        try:
            self._send(node, message)
        except Unavailable:
            logger.debug("dropped %s: no session", type(message).__name__)

    def _committing(self, do: Do, token: str) -> None:
        """COMMIT in one phase is about to be sent to the database."""
        with self._lock:
            message = self._table.committing(do.gid.branch, token)
            if (commit := self._local.get(do.gid.xid)) is not None:
                commit.token = token
        if message is not None:
            self.tell(do.gid.node, message)


FINISHING = frozenset(
    {Operation.ROLLBACK, Operation.COMMIT_PREPARED, Operation.ROLLBACK_PREPARED, Operation.ONE_PHASE_RESULT}
)
"""What frees locks or learns the truth: it has workers of its own, of each resource."""

_NEEDS_WORK = frozenset({Operation.ROLLBACK, Operation.INTERRUPT})
_ENDS_WORK = frozenset({Operation.PREPARE, Operation.COMMIT_ONE_PHASE, Operation.ROLLBACK})


_BROKE = {
    Operation.PREPARE: BranchInput.PREPARE_FAILED,
    Operation.COMMIT_ONE_PHASE: BranchInput.ONE_PHASE_ENDED,
    Operation.ROLLBACK: BranchInput.ROLLED_BACK,
}
