"""What a process does for the transactions that one of its resources decides, once they are decided, and for those who ask.

How to think of it
    The register is a table of the resource's own database, and says the same to all processes that reach that.  So this process
    need not know the transaction: it answers questions about any (`asked`), looks the register through now and then for decisions
    that no coordinator has heard of (`look_through`), and marks those whose branches have all committed (`done`).

What is called from the session is called under the client's lock; `txrpc._client.deciding` is the root's side.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from txrpc._client import effects, greeting
from txrpc._client.state import ClientState
from txrpc._protocol.deciding import DecisionDone, RegisterAnswer, RegisterQuestion
from txrpc._protocol.outcomes import Found
from txrpc._wire.deciding import decode_decision, encode_decision
from txrpc.errors import BadMessage, ConfigurationError, ResourceUnavailable, UsageError
from txrpc.ids import RegisterId, Xid

__all__ = ["asked", "default_of", "done", "holder", "look_through", "mark", "register_of"]

logger = logging.getLogger("txrpc.client")

_MARK_EVERY_MS = 500
_MARKS_MAX = 1_000
_KEEPS_NONE = "resource {!r} keeps no decisions: make it with decides=True"


def default_of(client: ClientState, given: Any) -> str:
    """Return the name of the resource that decides this client's transactions, unless one says otherwise; "" if there is none.

    Raises `UsageError` for what is no resource's name, `ConfigurationError` for a resource of this process that does not decide.
    """
    name = "" if given is None else _name(given)
    mine = client.resources.get(name)
    if mine is not None and getattr(mine, "decider", None) is None:
        raise ConfigurationError(_KEEPS_NONE.format(name))
    if mine is None and not isinstance(given, str | None):
        raise ConfigurationError(
            f"decide_in={name!r} is not among this process's resources: give it in resources= as well"
        )
    return name


def _name(given: Any) -> str:
    name = given if isinstance(given, str) else getattr(given, "name", None)
    if not isinstance(name, str):
        raise UsageError(f"decide_in takes a resource, or its name, not {given!r}")
    return name


def register_of(client: ClientState, given: Any) -> tuple[str, RegisterId]:
    """Return the name of the resource that is to decide, of this process or another one, and its register.

    Raises `ConfigurationError` if it does not decide, `ResourceUnavailable` if it is not ready, or no process has brought it yet.
    """
    name = _name(given)
    if name not in client.resources:
        if (elsewhere := client.registers.get(name)) is not None:
            return name, elsewhere
        known = ", ".join(sorted({*client.resources, *client.registers})) or "none"
        raise ResourceUnavailable(
            f"decide_in={name!r}: neither this process nor another one that has connected has such a resource with decides=True; "
            f"known are {known}"
        )
    if trouble := client.starting.trouble(name):
        raise ResourceUnavailable(f"resource {name!r} of this process is not ready: {trouble}")
    register = client.starting.register(name)
    if register is None:
        raise ConfigurationError(_KEEPS_NONE.format(name))
    return name, register


def holder(client: ClientState, register: RegisterId) -> str | None:
    """Return the resource that may be asked, also for what an earlier incarnation of its database has decided."""
    for name in client.resources:
        known = client.starting.register(name)
        if known is not None and known.table == register.table:
            return name
    return None


def asked(client: ClientState, node: str, question: RegisterQuestion) -> None:
    """Coordinator *node* has asked: ask the register, and answer."""
    name = holder(client, question.register)
    answer = functools.partial(_answer, client, node, question)
    if name is None:
        answer(ResourceUnavailable("this process does not have it"))
    else:
        ask, commit = client.resources[name].decider.ask, None
        if question.commit is not None:
            commit = encode_decision(question.register, question.commit)
        client.runtime.aside(name, ask, (question.register, question.xid, question.claim, commit), answer)


def _answer(client: ClientState, node: str, question: RegisterQuestion, said: Any) -> None:
    register, xid = question.register, question.xid
    try:
        if isinstance(said, BaseException):
            raise said
        decided = decode_decision(xid, said[1])
        answer = RegisterAnswer(register, xid, said[0], decided.branches if decided is not None else ())
    except Exception as error:
        logger.warning("cannot ask how transaction %s was decided: %s", xid, error)
        answer = RegisterAnswer(register, xid, Found.UNREACHABLE)
    with client.lock:
        effects.tell(client, node, answer)


def look_through(client: ClientState, name: str) -> None:
    """Say again what resource *name* has decided and no coordinator has called done; and let it forget what is over."""
    if client.starting.register(name) is None:
        return
    decider = client.resources[name].decider
    client.runtime.aside(name, decider.undone, (), functools.partial(_announce, client, name))
    client.runtime.aside(name, decider.forget, (), functools.partial(_note, name))
    client.runtime.aside(name, decider.open, (), functools.partial(_opened, client, name))


def _opened(client: ClientState, name: str, found: Any) -> None:
    """The database may have failed over since the register was opened: then transactions are decided in its next incarnation."""
    if isinstance(found, BaseException):
        _note(name, found)
        return
    with client.lock:
        if client.starting.reopened(name, found):
            logger.warning("the database of resource %s has failed over, or was restored", name)
            greeting.announce(client)


def _announce(client: ClientState, name: str, found: Any) -> None:
    if isinstance(found, BaseException):
        _note(name, found)
        return
    rows: Sequence[tuple[Xid, bytes]] = found
    with client.lock:
        for xid, data in rows:
            try:
                if (decided := decode_decision(xid, data)) is not None:
                    effects.tell(client, "", decided)
            except BadMessage as error:
                logger.error("the decision about %s in resource %s cannot be read: %s", xid, name, error)


def done(client: ClientState, message: DecisionDone) -> None:
    """All branches of these have committed: mark their rows, soon, together with others.

    A mark is a commit of its own in the database, and nothing waits for it.
    """
    name = holder(client, message.register)
    if name is None:
        return
    client.to_mark.setdefault(name, []).extend(message.xids)
    if name not in client.mark_at:
        client.mark_at[name] = client.now_ms() + _MARK_EVERY_MS
        client.runtime.wake()


def mark(client: ClientState, now_ms: int | None = None) -> None:
    """Mark what is due at *now_ms*; everything if it is None, because the client closes."""
    for name in [name for name, at_ms in client.mark_at.items() if now_ms is None or at_ms <= now_ms]:
        del client.mark_at[name]
        xids = client.to_mark.pop(name)
        # What is not marked, for whatever reason, is said again.
        for first in range(0, len(xids), _MARKS_MAX):
            batch = xids[first : first + _MARKS_MAX]
            decider = client.resources[name].decider
            client.runtime.aside(name, decider.mark_done, (batch,), functools.partial(_note, name))


def _note(name: str, found: object) -> None:
    if isinstance(found, BaseException):
        logger.warning("the register of resource %s cannot be reached: %s", name, found)
