"""What both clients share: the participant's table and everything around it that neither blocks nor awaits.

How to think of it
    `ClientState` is one process's side of txrpc.  It holds the participant (the table of this process's branches), the session
    to the coordinator, and the resources.  Everything that changes the table happens under one lock and yields effects, which
    are applied under the same lock where they are cheap (messages are queued, futures are set) and handed to `Runtime.operate`
    where they block (operations on a database).

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

from txrpc._client import effects, greeting, registers, requests
from txrpc._client.coordinators import KnownCoordinator, Outbox, live
from txrpc._client.local_transaction import LocalTransaction
from txrpc._client.state import ClientState, ManagerStatus
from txrpc._protocol.deciding import Decide, DecisionDone, RegisterQuestion, Registers, Votes
from txrpc._protocol.messages import (
    Abandon,
    Commit,
    FromCoordinator,
    GoAway,
    Hello,
    OnePhaseDone,
    OnePhaseToken,
    Outcome,
    OutcomeReply,
    Owner,
    Resolve,
    Rollback,
    Takeover,
    Tick,
    TransactionContext,
    Welcome,
)
from txrpc.errors import (
    AbortCode,
    BadMessage,
    ConfigurationError,
    CoordinatorUnavailable,
    ForkedError,
    Reason,
    UsageError,
    aborted,
)
from txrpc.ids import Gid, Xid

__all__ = ["DEFAULT_TIMEOUT_S", "ClientCore", "check_timeout"]

logger = logging.getLogger("txrpc.client")

DEFAULT_TIMEOUT_S = 30.0
_SWEEP_MS = 30_000
_SWEEP_RETRY_MS = 2_000
_START_RETRY_MS = 2_000


def check_timeout(timeout: float | None, name: str = "timeout") -> None:
    """Raise `UsageError` unless *timeout*, given as the argument *name*, is None or a positive number."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout > 0):
        raise UsageError(f"{name} is a positive number of seconds, not {timeout!r}")


class ClientCore:
    """See the module's docstring; `Client` and `AsyncClient` have one, and are its `Runtime`."""

    def __init__(self, state: ClientState) -> None:
        self.state = state

    # --------------------------------------------------------------------------------------------------- transactions

    def begin_part(self, timeout_s: float | None, read_only: bool, decide_in: Any = None) -> LocalTransaction:
        """A root's part.  Nothing is sent.  *decide_in*: a resource that decides, or its name; "": none; None: the client's own."""
        self.check_fork()
        timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        check_timeout(timeout_s)
        chosen = self.state.chosen
        if chosen is not None and timeout_s * 1000 > chosen.welcome.max_timeout_ms:
            longest_s = chosen.welcome.max_timeout_ms / 1000
            raise UsageError(f"timeout={timeout_s:g} s is above the coordinator's max_timeout of {longest_s:g} s")
        xid = Xid.make(self.state.unix_ms(), self.state.entropy(10))
        owner, tick = (chosen.owner, chosen.tick) if chosen is not None else (None, 0)
        deadline_ms = self.state.now_ms() + int(timeout_s * 1000)
        part = LocalTransaction(xid, owner, self.state.group, deadline_ms, read_only, tick, timeout_s)
        decider = self.state.decide_in if decide_in is None else decide_in
        if decider != "" and not read_only:
            part.decides_in, part.register = registers.register_of(self.state, decider)
        return part

    def join_part(self, context: TransactionContext) -> LocalTransaction:
        """The part of an incoming call.  See `txrpc._grpc.ports.Joiner.join` for what is raised."""
        self.check_fork()
        self.state.serves = True
        if context.group != self.state.group:
            raise ConfigurationError(
                f"the caller belongs to coordinator group {context.group!r}, this service to {self.state.group!r}"
            )
        if self.state.resources:
            self._check_owner(context)
        if context.time_left_ms <= 0:
            raise aborted(context.xid, Reason(AbortCode.TIMED_OUT, "the call arrived with no time left"))
        with self.state.lock:
            if self.state.participant.state.is_closed(context.xid):
                raise aborted(context.xid, Reason(AbortCode.BRANCH_UNKNOWN, self._too_late(context.xid)))
        deadline_ms = self.state.now_ms() + context.time_left_ms
        return LocalTransaction(
            context.xid,
            context.owner,
            self.state.group,
            deadline_ms,
            context.read_only,
            0,
            call_reads_only=context.call_reads_only,
            register=context.register,
        )

    def _too_late(self, xid: Xid) -> str:
        found = (self.state.participant.state.find(xid, name) for name in self.state.resources)
        if any(row is not None and row.early for row in found):
            return (
                "the call came after the transaction's final call to this service, which has voted: make no call after one in "
                "txrpc.final_call() or to a method with transactional(final=True)"
            )
        return "the call came after the transaction had ended here"

    def _check_owner(self, context: TransactionContext) -> None:
        node, epoch = context.owner.node, context.owner.epoch
        if context.register is not None:
            # Any coordinator will do, in any epoch.
            if live(self.state, "") is None:
                raise CoordinatorUnavailable("this service has no session with a coordinator")
            return
        known = self.state.coordinators.get(node)
        if known is not None and known.owner.epoch > epoch:
            text = f"it began under epoch {epoch} of a coordinator that is in {known.owner.epoch} now"
            raise aborted(context.xid, Reason(AbortCode.COORDINATOR_RESTARTED, text))
        if known is None or known.session is None:
            raise CoordinatorUnavailable(
                f"this service has no session with coordinator {node!r}, which owns the transaction"
            )
        if known.owner.epoch < epoch:
            raise CoordinatorUnavailable("this service has not reconnected to the restarted coordinator yet")

    # ---------------------------------------------------------------------------------------------------- the session

    def hello(self, session: Outbox) -> Hello:
        """Return what this process says first, on every connect of *session*."""
        with self.state.lock:
            return greeting.hello(self.state, session)

    def on_welcome(self, session: Outbox, welcome: Welcome) -> None:
        """A session has begun, with the node whose address it is.  Raises `BadMessage` if it must not be used."""
        with self.state.lock:
            greeting.welcomed(self.state, session, welcome, home=True)

    def on_lost(self, session: Outbox, text: str) -> None:
        """The session has ended: nothing on its way will be answered on it."""
        with self.state.lock:
            for known in self.state.coordinators.values():
                if known.session is session:
                    greeting.lost(self.state, known, text)

    def on_refused(self, _session: Outbox) -> None:
        """The session will never be open: those who wait for it are told."""
        with self.state.lock:
            self.state.runtime.sessions_changed()

    def on_message(self, session: Outbox, node: str, message: FromCoordinator) -> None:
        """Take a message of coordinator *node*'s, which may be another one than that of the session's address."""
        with self.state.lock:
            known = self.state.coordinators.get(node)
            if isinstance(message, Takeover):
                greeting.greet(self.state, session, node)
            elif isinstance(message, Welcome):
                self._taken_over(session, message)
            elif known is None or known.session is not session:
                # An earlier epoch, which has not noticed that it is over; or nonsense (rules 7 and 15).
                logger.info("coordinator %s is not listened to here: %s", node, type(message).__name__)
            elif isinstance(message, GoAway):
                logger.info("coordinator %s leaves: %s", node, message.text)
                greeting.lost(self.state, known, message.text)
            else:
                self._listen(known, message)

    def _taken_over(self, session: Outbox, welcome: Welcome) -> None:
        try:
            greeting.welcomed(self.state, session, welcome, home=False)
        except BadMessage as error:
            logger.warning("a takeover is not believed: %s", error)

    def _listen(self, known: KnownCoordinator, message: Any) -> None:
        node = known.owner.node
        if isinstance(message, OutcomeReply | Tick | Commit):
            known.position = max(known.position, message.position)
        if isinstance(message, OutcomeReply | Votes):
            requests.replied(self.state, node, message)
        elif isinstance(message, Tick):
            known.tick, known.heard = message.tick, max(known.heard, message.heard)
        elif isinstance(message, RegisterQuestion):
            registers.asked(self.state, node, message)
        elif isinstance(message, Registers):
            self.state.registers |= dict(message.names)
        elif isinstance(message, DecisionDone):
            registers.done(self.state, message)
        elif isinstance(message, OnePhaseToken):
            if (node, message.xid) in self.state.requests:
                requests.keep(self.state.tokens, message.xid, message.token)
        else:
            self.state.asker = node
            self._about_branch(known, message)

    def _about_branch(self, known: KnownCoordinator, message: Any) -> None:
        now_ms = self.state.now_ms()
        if not isinstance(message, Abandon) and effects.node_of(self.state, message) not in ("", self.state.asker):
            logger.error("coordinator %s gives orders about a branch of another one's", self.state.asker)
            return
        if isinstance(message, Abandon):
            longest_ms = known.welcome.max_timeout_ms
            effects.apply(self.state, self.state.participant.abandon(message, self.state.resources, longest_ms, now_ms))
            return
        if isinstance(message, Decide) and self._is_elsewhere(message):
            # Another database has its name (rule 17), or it keeps no decisions.
            refused = Reason(AbortCode.PROTOCOL_VIOLATION, "it was to decide in a register that it does not have")
            answer = OnePhaseDone(message.xid, message.branch, Outcome.ABORTED, refused)
            effects.tell(self.state, known.owner.node, answer)
            return
        if isinstance(message, Resolve) and self._is_foreign(message):
            effects.apply(
                self.state,
                self.state.participant.resolve_foreign(self._gid(known.owner, message), message.token, now_ms),
            )
            return
        if isinstance(message, Commit | Rollback) and message.gid.resource not in self.state.resources:
            logger.error(
                "asked to finish a branch of resource %s, which this process does not have", message.gid.resource
            )
            return
        if isinstance(message, Commit) and message.gid.register is not None:
            self.state.ordered_by.setdefault(message.gid.branch, {})[self.state.asker] = None
        effects.apply(self.state, self.state.participant.received(message, now_ms))

    def _is_elsewhere(self, message: Decide) -> bool:
        """Return whether the branch that is to decide is not in the resource that has the register."""
        row = self.state.participant.rows.get(message.branch)
        return row is not None and registers.holder(self.state, message.register) != row.gid.resource

    def _is_foreign(self, message: Resolve) -> bool:
        """Return whether this asks about another process's branch, which this one's database can tell."""
        return bool(
            message.branch not in self.state.participant.rows
            and message.token
            and message.resource in self.state.resources
        )

    def _gid(self, owner: Owner, message: Resolve) -> Gid:
        return Gid(
            self.state.group,
            owner.node,
            owner.epoch,
            message.xid,
            message.branch,
            self.state.participant_id,
            message.resource,
        )

    # ------------------------------------------------------------------------------------------------------ resources

    def started(self, name: str, found: object) -> None:
        """What `Resource.start` of *name* returned or raised; what was raised is tried again after a while."""
        with self.state.lock:
            news, now_ms = self.state.starting.took(name, found), self.state.now_ms()
            trouble = self.state.starting.trouble(name)
            if trouble:
                self.state.start_at[name] = now_ms + int(_START_RETRY_MS * (0.5 + self.state.jitter()))
            else:
                self.state.sweep_at[name] = now_ms
            if news and self.state.sessions:
                logger.log(
                    logging.WARNING if trouble else logging.INFO, "resource %r: %s", name, trouble or "it is ready"
                )
                greeting.announce(self.state)
            self.state.runtime.wake()

    # ----------------------------------------------------------------------------------------------------- the clock

    def status(self) -> ManagerStatus:
        """See `TransactionManager.status`."""
        with self.state.lock:
            node = self.state.chosen.owner.node if self.state.chosen is not None else None
            resources = {name: self.state.starting.trouble(name) for name in self.state.resources}
            return ManagerStatus(node, resources, {each.address: each.trouble for each in self.state.sessions})

    def woke(self) -> list[str]:
        """Let time pass; returns the resources to look after now: to start, or, if they are ready, to sweep their databases."""
        with self.state.lock:
            now_ms = self.state.now_ms()
            effects.apply(self.state, self.state.participant.woke(now_ms))
            effects.ask_again(self.state, now_ms)
            registers.mark(self.state, now_ms)
            to_start = [name for name, at_ms in self.state.start_at.items() if at_ms <= now_ms]
            for name in to_start:
                del self.state.start_at[name]
            if not self._connected():
                return to_start
            due = [name for name, at_ms in self.state.sweep_at.items() if at_ms <= now_ms]
            for name in due:
                self.state.sweep_at[name] = now_ms + int(_SWEEP_MS * (0.5 + self.state.jitter()))
            return [*to_start, *due]

    def _connected(self) -> bool:
        return any(known.session is not None for known in self.state.coordinators.values())

    def next_wakeup_ms(self) -> int | None:
        """Return when `woke` is due."""
        state = self.state
        with state.lock:
            timer_ms = state.participant.state.next_wakeup_ms()
            due = [*state.start_at.values(), *state.mark_at.values()]
            if state.ask_at:
                due += (at_ms for at_ms, _ in state.ask_at.values())
            if timer_ms is not None:
                due.append(timer_ms)
            next_ms = min(due, default=None)
            sweep_ms = min(state.sweep_at.values(), default=None)
            if sweep_ms is not None and (next_ms is None or sweep_ms < next_ms) and self._connected():
                return sweep_ms
            return next_ms

    def swept(self, name: str, began_ms: int, found: Sequence[tuple[Gid, int]] | BaseException) -> None:
        """What the database of resource *name* holds prepared for this group, asked at *began_ms*; or why it could not say."""
        with self.state.lock:
            if isinstance(found, BaseException):
                logger.warning("cannot look for branches in doubt in resource %s: %s", name, found)
                self.state.sweep_at[name] = self.state.now_ms() + int(_SWEEP_RETRY_MS * (0.5 + self.state.jitter()))
                self.state.runtime.wake()
                return
            for gone in self.state.participant.swept(
                name, {gid.branch for gid, _ in found}, began_ms, self.state.now_ms()
            ):
                logger.warning("%s is not prepared any more: it was ended by hand, or its database has lost it", gone)
            for gid, since_ms in found:
                if live(self.state, gid.node) is not None:
                    effects.apply(self.state, self.state.participant.in_doubt(gid, since_ms, self.state.now_ms()))
            registers.look_through(self.state, name)

    # ------------------------------------------------------------------------------------------------------------ fork

    def check_fork(self) -> None:
        """Raise `ForkedError` in a forked child, where locks may be held by threads that it does not have."""
        if os.getpid() != self.state.pid:
            raise ForkedError(
                "this txrpc manager was made in the parent of this process, and gRPC does not survive a fork: "
                "call txrpc.connect() in the child (gunicorn: in post_fork; multiprocessing: in the worker function)"
            )
