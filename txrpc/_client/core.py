"""What both clients share: the participant's table and everything around it that neither blocks nor awaits.

How to think of it
    A manager is the process's side of txrpc.  It holds the participant (the table of this process's branches), the session to
    the coordinator, and the resources.  Everything that changes the table happens under one lock and yields effects, which
    are applied under the same lock where they are cheap (messages are queued, futures are set) and handed to `_start` where
    they block (operations on a database).

    What the coordinator asks about branches goes straight into the table.  Replies to what roots asked go to futures.

Recovery is three small things here: on every welcome the table asks about what is in doubt, the databases are swept for
prepared branches that no live process of this resource knows, and the sweep is repeated at a slow, jittered pace.

A resource whose database is out of reach when the process starts is started later; until then it can be neither used nor swept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from txrpc._client.asking import Asking, keep
from txrpc._client.branches import NOBODY, Branches
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.state import ManagerStatus
from txrpc._protocol.messages import (
    PROTOCOL_VERSION,
    Abandon,
    Commit,
    FromCoordinator,
    Hello,
    OnePhaseToken,
    Outcome,
    OutcomeReply,
    Resolve,
    Rollback,
    Tick,
    TransactionContext,
    Welcome,
)
from txrpc.errors import (
    AbortCode,
    ConfigurationError,
    CoordinatorUnavailable,
    ForkedError,
    Reason,
    UsageError,
    aborted,
)
from txrpc.ids import Gid, Xid

__all__ = ["ClientCore", "check_timeout"]

logger = logging.getLogger("txrpc.client")

DEFAULT_TIMEOUT_S = 30.0
_SWEEP_MS = 30_000
_SWEEP_RETRY_MS = 2_000
_START_RETRY_MS = 2_000


def check_timeout(timeout: float | None) -> None:
    """Raise `UsageError` unless *timeout* is None or a positive number."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout > 0):
        raise UsageError(f"timeout is a positive number of seconds, not {timeout!r}")


class ClientCore(Branches, Asking):
    """See the module's docstring; `Client` and `AsyncClient` add threads and tasks."""

    # --------------------------------------------------------------------------------------------------- transactions

    def begin_part(self, timeout_s: float | None, read_only: bool) -> LocalTransaction:
        """A root's part.  Nothing is sent."""
        self._check_fork()
        timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        check_timeout(timeout_s)
        welcome = self.welcome
        if welcome is not None and timeout_s * 1000 > welcome.max_timeout_ms:
            raise UsageError(
                f"timeout={timeout_s:g} s is above the coordinator's max_timeout of {welcome.max_timeout_ms / 1000:g} s"
            )
        xid = Xid.make(self.unix_ms(), self.entropy(10))
        owner = welcome.owner if welcome is not None else None
        deadline_ms = self.now_ms() + int(timeout_s * 1000)
        return LocalTransaction(xid, owner, self.group, deadline_ms, read_only, self._tick)

    def join_part(self, context: TransactionContext) -> LocalTransaction:
        """The part of an incoming call.  See `txrpc._grpc.ports.Joiner.join` for what is raised."""
        self._check_fork()
        self.serves = True
        if context.group != self.group:
            raise ConfigurationError(
                f"the caller belongs to coordinator group {context.group!r}, this service to {self.group!r}"
            )
        if self.resources:
            self._check_owner(context)
        if context.time_left_ms <= 0:
            raise aborted(context.xid, Reason(AbortCode.TIMED_OUT, "the call arrived with no time left"))
        with self._lock:
            if self._table.state.is_closed(context.xid):
                raise aborted(
                    context.xid, Reason(AbortCode.BRANCH_UNKNOWN, "the call came after the transaction had ended here")
                )
        deadline_ms = self.now_ms() + context.time_left_ms
        return LocalTransaction(context.xid, context.owner, self.group, deadline_ms, context.read_only, self._tick)

    def _check_owner(self, context: TransactionContext) -> None:
        welcome = self.welcome
        if welcome is None or welcome.owner.node != context.owner.node:
            node = context.owner.node
            raise CoordinatorUnavailable(
                f"this service has no session with coordinator {node!r}, which owns the transaction"
            )
        if welcome.owner.epoch != context.owner.epoch:
            if welcome.owner.epoch < context.owner.epoch:
                raise CoordinatorUnavailable("this service has not reconnected to the restarted coordinator yet")
            text = f"it began under epoch {context.owner.epoch} of a coordinator that is in {welcome.owner.epoch} now"
            raise aborted(context.xid, Reason(AbortCode.COORDINATOR_RESTARTED, text))

    # ---------------------------------------------------------------------------------------------------- the session

    def hello(self) -> Hello:
        """What this process says first, on every connect."""
        me, self._announced = self.participant_id, self._starting.version
        infos = self._starting.infos
        return Hello(PROTOCOL_VERSION, self.group, me, self.process, infos, self._seen, self._position)

    def on_welcome(self, welcome: Welcome) -> None:
        """A session has begun."""
        with self._lock:
            if self._seen is not None and self._seen != welcome.owner:
                fields = {"node": welcome.owner.node, "epoch": str(welcome.owner.epoch)}
                logger.info("the coordinator has restarted", extra=fields)
            if self._seen is None or self._seen.node != welcome.owner.node:
                self._position = 0
            self.welcome, self._seen, self._tick = welcome, welcome.owner, welcome.tick
            self._position = max(self._position, welcome.position)
            self._announce()
            self._apply(self._table.connected(self.now_ms()))
            self._apply(self._table.coordinator_is(welcome.owner, self.now_ms()))
            self._sweep_at = {name: self.now_ms() for name in self.resources if not self._starting.trouble(name)}
            self._wake()

    def on_lost(self, text: str) -> None:
        """The session has ended: nothing on its way will be answered on it."""
        with self._lock:
            self.welcome = None
            lost, self._asking = self._asking, {}
        for futures in lost.values():
            for future in futures:
                self._settle(future, CoordinatorUnavailable(f"the session with the coordinator broke: {text}"))

    def on_message(self, node: str, message: FromCoordinator) -> None:
        """Take a message of coordinator *node*'s."""
        with self._lock:
            if self._seen is None or node != self._seen.node:
                logger.error("coordinator %s said %s on another one's session", node, type(message).__name__)
                return
            if isinstance(message, OutcomeReply | Tick | Commit):
                self._position = max(self._position, message.position)
            if isinstance(message, OutcomeReply):
                if message.outcome is not Outcome.UNKNOWN:
                    self._tokens.pop(message.xid, None)
                for future in self._asking.pop(message.xid, ()):
                    self._settle(future, message)
            elif isinstance(message, Tick):
                self._tick = message.tick
            elif isinstance(message, OnePhaseToken):
                if message.xid in self._asking:
                    keep(self._tokens, message.xid, message.token)
            elif not isinstance(message, Welcome):
                self._asker = node
                self._about_branch(message)

    def _about_branch(self, message: Any) -> None:
        now_ms = self.now_ms()
        if not isinstance(message, Abandon) and self._node_of(message) != self._asker:
            logger.error("coordinator %s gives orders about a branch of another one's", self._asker)
            return
        if isinstance(message, Abandon):
            longest_ms = self.welcome.max_timeout_ms if self.welcome is not None else 0
            self._apply(self._table.abandon(message, self.resources, longest_ms, now_ms))
            return
        if isinstance(message, Resolve) and self._is_foreign(message):
            self._apply(self._table.resolve_foreign(self._gid(message), message.token, now_ms))
            return
        if isinstance(message, Commit | Rollback) and message.gid.resource not in self.resources:
            logger.error(
                "asked to finish a branch of resource %s, which this process does not have", message.gid.resource
            )
            return
        self._apply(self._table.received(message, now_ms))

    def _is_foreign(self, message: Resolve) -> bool:
        """Whether this asks about another process's branch, which this one's database can tell."""
        return bool(message.branch not in self._table.rows and message.token and message.resource in self.resources)

    def _gid(self, message: Resolve) -> Gid:
        owner = self._seen or NOBODY
        return Gid(
            self.group, owner.node, owner.epoch, message.xid, message.branch, self.participant_id, message.resource
        )

    # ------------------------------------------------------------------------------------------------------ resources

    def started(self, name: str, found: Any) -> None:
        """What `Resource.start` of *name* returned or raised; what was raised is tried again after a while."""
        with self._lock:
            news, now_ms = self._starting.took(name, found), self.now_ms()
            trouble = self._starting.trouble(name)
            if trouble:
                self._start_at[name] = now_ms + int(_START_RETRY_MS * (0.5 + self.jitter()))
            else:
                self._sweep_at[name] = now_ms
            if news and self._session is not None:
                logger.log(
                    logging.WARNING if trouble else logging.INFO, "resource %r: %s", name, trouble or "it is ready"
                )
                self._announce()
            self._wake()

    def _announce(self) -> None:
        """Say Hello again if the resources have changed since."""
        if self.welcome is not None and self._announced != self._starting.version:
            self.tell(self.welcome.owner.node, self.hello())

    # ----------------------------------------------------------------------------------------------------- the clock

    def status(self) -> ManagerStatus:
        """See `TransactionManager.status`."""
        with self._lock:
            node = self.welcome.owner.node if self.welcome is not None else None
            return ManagerStatus(node, {name: self._starting.trouble(name) for name in self.resources})

    def woke(self) -> list[str]:
        """Let time pass; returns the resources to look after now: to start, or, if they are ready, to sweep their databases."""
        with self._lock:
            now_ms = self.now_ms()
            self._apply(self._table.woke(now_ms))
            to_start = [name for name, at_ms in self._start_at.items() if at_ms <= now_ms]
            for name in to_start:
                del self._start_at[name]
            if self.welcome is None:
                return to_start
            due = [name for name, at_ms in self._sweep_at.items() if at_ms <= now_ms]
            for name in due:
                self._sweep_at[name] = now_ms + int(_SWEEP_MS * (0.5 + self.jitter()))
            return [*to_start, *due]

    def next_wakeup_ms(self) -> int | None:
        """When `woke` is due."""
        with self._lock:
            due = [*self._start_at.values(), *(self._sweep_at.values() if self.welcome is not None else ())]
            next_ms = self._table.state.next_wakeup_ms()
            return min([*due, next_ms] if next_ms is not None else due, default=None)

    def swept(self, name: str, found: Sequence[tuple[Gid, int]] | BaseException) -> None:
        """What the database of resource *name* holds prepared for this group, or why it could not say."""
        with self._lock:
            if isinstance(found, BaseException):
                logger.warning("cannot look for branches in doubt in resource %s: %s", name, found)
                self._sweep_at[name] = self.now_ms() + int(_SWEEP_RETRY_MS * (0.5 + self.jitter()))
                self._wake()
                return
            for gid, since_ms in found:
                if self._seen is not None and gid.node == self._seen.node:
                    self._apply(self._table.in_doubt(gid, since_ms, self.now_ms()))

    # ------------------------------------------------------------------------------------------------------------ fork

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                "this txrpc manager was made in the parent of this process, and gRPC does not survive a fork: "
                "call txrpc.connect() in the child (gunicorn: in post_fork; multiprocessing: in the worker function)"
            )
