"""Apply the effects of the participant's table: send messages, settle futures, start operations; and take their results.

All functions but `operated`, `committing` and `tell` are called under the client's lock, so that messages about one
branch leave in the order of the steps that made them.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from txrpc._client.coordinators import Outbox, live, unavailable
from txrpc._client.state import ClientState, Later
from txrpc._protocol.deciding import Decided
from txrpc._protocol.messages import Acked, Hello, Outcome, ToCoordinator, Trouble
from txrpc._protocol.participant.branch import BranchInput, Do, Effects, Operation
from txrpc.errors import Reason, Unavailable
from txrpc.ids import BranchId

__all__ = [
    "FINISHING",
    "apply",
    "ask_again",
    "committing",
    "greet",
    "node_of",
    "operated",
    "send",
    "tell",
]

logger = logging.getLogger("txrpc.client")

FINISHING = frozenset(
    {
        Operation.ROLLBACK,
        Operation.COMMIT_PREPARED,
        Operation.ROLLBACK_PREPARED,
        Operation.ONE_PHASE_RESULT,
        Operation.ASK_AGAIN,
    }
)
"""What frees locks or learns the truth: it has workers of its own, of each resource."""

_ASK_AFTER_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0)
"""Before each question about the end of a branch: half a minute together, long enough for a restart."""

_ANSWERS = frozenset({Operation.PREPARE, Operation.COMMIT_ONE_PHASE})
_NEEDS_WORK = frozenset({Operation.ROLLBACK, Operation.INTERRUPT})
_ENDS_WORK = frozenset({Operation.PREPARE, Operation.COMMIT_ONE_PHASE, Operation.ROLLBACK, Operation.ASK_AGAIN})


def apply(client: ClientState, effects: Effects, here: list[Do] | None = None) -> None:
    """Apply *effects*: free the waiters first, start operations last.

    *here*: takes what ends the work of a branch, which the caller then carries out, without the lock.
    """
    for branch, result, reason in effects.settle:
        _settle(client, branch, result, reason)
    for branch, vote, why in effects.votes:
        if (future := client.early_votes.pop(branch, None)) is not None:
            client.runtime.settle(future, (vote, why))
    for mistake in effects.mistakes:
        logger.warning("protocol violation: %s", mistake)
    if effects.send:
        _send_all(client, effects.send)
    for do in effects.do:
        if here is not None and do.operation in _ANSWERS:
            here.append(do)
        else:
            _start(client, do)
    client.runtime.wake()


def _start(client: ClientState, do: Do) -> None:
    branch = client.branches.get(do.gid.branch)
    if do.operation not in _NEEDS_WORK or (branch is not None and branch.work is not None):
        client.runtime.operate(do, branch)
    elif do.operation is Operation.ROLLBACK:
        operated(client, do, (BranchInput.ROLLED_BACK, None))


def _settle(client: ClientState, branch: BranchId, result: Outcome, reason: Reason | None) -> None:
    row = client.participant.rows.get(branch)
    if row is not None and (commit := client.local_commits.get(row.xid)) is not None:
        commit.result = result
    future = client.local_ends.pop(branch, None)
    if future is not None:
        client.runtime.settle(future, (result, reason))


def _send_all(client: ClientState, messages: list[ToCoordinator]) -> None:
    for message in messages:
        if isinstance(message, Trouble) and message.reason is not None:
            logger.warning("%s (%s)", message.reason.text, message.gid)
    addressed = [(node, message) for message in messages for node in _nodes_of(client, message)]
    for node, group in itertools.groupby(addressed, operator.itemgetter(0)):
        try:
            send(client, node, *(message for _, message in group))
        except Unavailable:  # no session, or more waits for it than it takes
            logger.debug("dropped what was for coordinator %s: no session", node)


def _nodes_of(client: ClientState, message: ToCoordinator) -> Iterable[str]:
    """`node_of`; an acknowledgement goes to each coordinator that has given the order."""
    ordered_by = client.ordered_by.pop(message.branch, None) if isinstance(message, Acked) else None
    return ordered_by or (node_of(client, message),)


def operated(client: ClientState, do: Do, result: tuple[BranchInput, Any] | Later | None) -> None:
    """Take the result of an operation; None: the resource that was asked for it cannot tell yet."""
    if do.operation is Operation.INTERRUPT:
        return  # what it broke off brings its own result
    with client.lock:
        if isinstance(result, Later):
            branch = client.branches.get(do.gid.branch)
            if branch is not None:
                branch.later = result
            result = None if branch is not None else result.otherwise
        if result is None and (result := _ask_later(client, do)) is None:
            return
        if do.operation in _ENDS_WORK and result[0] is not BranchInput.KEPT_OPEN:
            client.branches.pop(do.gid.branch, None)
        apply(client, client.participant.step(result[0], do.gid.branch, client.now_ms(), result[1]))


def _ask_later(client: ClientState, do: Do) -> tuple[BranchInput, Any] | None:
    """Ask again when the next question is due; return the result if there is none."""
    branch = client.branches[do.gid.branch]
    if branch.later is not None and branch.questions == len(_ASK_AFTER_S):
        return branch.later.otherwise
    due_ms = client.now_ms() + int(_ASK_AFTER_S[branch.questions] * 1000)
    branch.questions += 1
    client.ask_at[do.gid.branch] = due_ms, replace(do, operation=Operation.ASK_AGAIN)
    client.runtime.wake()
    return None


def ask_again(client: ClientState, now_ms: int) -> None:
    """Ask for the end of those branches about which a question is due."""
    due = [branch for branch, (at_ms, _) in client.ask_at.items() if at_ms <= now_ms]
    for branch in due:
        _at_ms, do = client.ask_at.pop(branch)
        client.runtime.operate(do, client.branches[branch])


def committing(client: ClientState, do: Do, token: str) -> None:
    """Note and report that COMMIT in one phase is about to be sent to the database."""
    with client.lock:
        message = client.participant.committing(do.gid.branch, token)
        if (commit := client.local_commits.get(do.gid.xid)) is not None:
            commit.token = token
    if message is not None:
        tell(client, do.gid.node, message)


def send(client: ClientState, node: str, *messages: ToCoordinator) -> None:
    """Send coordinator *node* messages; raises `CoordinatorUnavailable` when there is no session, `LimitExceeded`."""
    known = live(client, node)
    if known is None or known.session is None:
        raise unavailable(client, node)
    known.session.send(known.owner.node, *messages)


def greet(session: Outbox, node: str, hello: Hello) -> None:
    """Say Hello to coordinator *node* over *session*; if that has ended, it will be said on the next one."""
    try:
        session.send(node, hello)
    except Unavailable:
        logger.debug("no Hello to %s: no session", node)


def tell(client: ClientState, node: str, message: ToCoordinator) -> None:
    """Send coordinator *node* a message that needs no answer; without a session it is dropped."""
    try:
        send(client, node, message)
    except Unavailable:
        logger.debug("dropped %s: no session", type(message).__name__)


def node_of(client: ClientState, message: Any) -> str:
    """Return the coordinator of a message's branch; of a branch that is not known here, the one that asked.

    "": any, because the decision is in a register.
    """
    if hasattr(message, "gid"):
        node: str = message.gid.node
        return node
    if isinstance(message, Decided):
        return ""
    row = client.participant.rows.get(message.branch)
    return row.home if row is not None and row.xid == message.xid else client.asker
