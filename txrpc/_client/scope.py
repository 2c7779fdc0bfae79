"""Scopes: the blocks and decorated functions that a transaction reaches over, and how they nest (propagation)."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from txrpc._client.core import check_timeout
from txrpc._client.reasons import reason_of
from txrpc._client.retry import Retry
from txrpc._client.rollback_rules import ALWAYS, Kind, RollbackRules, kinds_of
from txrpc._context import current, current_reads_only, set_current
from txrpc._protocol.messages import Wait
from txrpc._wire.metadata import CONTEXT_KEY
from txrpc.errors import (
    ConfigurationError,
    NotJoined,
    NoTransaction,
    Reason,
    TransactionExists,
    UsageError,
)

__all__ = [
    "BaseScope",
    "New",
    "Plan",
    "Propagating",
    "Propagation",
    "Settings",
    "default_client",
    "is_generator",
    "refuse_undecoratable",
    "refuse_unjoined",
    "set_default_client",
]


class Propagation(enum.Enum):
    """What a scope does about the transaction that it finds current, or does not find (the words are Java EE's)."""

    REQUIRED = "required"
    """Join it, or begin one."""
    REQUIRES_NEW = "requires new"
    """Begin one of its own; the current one waits outside."""
    MANDATORY = "mandatory"
    """Join it; without one raise `NoTransaction`."""
    SUPPORTS = "supports"
    """Join it if there is one."""
    NOT_SUPPORTED = "not supported"
    """Run outside any transaction; the current one waits outside."""
    NEVER = "never"
    """Run outside any transaction; inside one raise `TransactionExists`."""


Propagating = Literal[Propagation.REQUIRED, Propagation.MANDATORY, "required", "mandatory", "REQUIRED", "MANDATORY"]
"""The propagations with which a block always has a transaction."""
New = Literal[Propagation.REQUIRES_NEW, "requires_new", "requires new", "requires-new", "REQUIRES_NEW"]
"""The propagation with which a block is always a root."""


class Plan(enum.Enum):
    """What a scope is going to be."""

    ROOT = "root"
    JOIN = "join"
    OUTSIDE = "outside"


_JOINS = frozenset({Propagation.REQUIRED, Propagation.MANDATORY, Propagation.SUPPORTS})
_BEGINS = frozenset({Propagation.REQUIRED, Propagation.REQUIRES_NEW})


@dataclass(frozen=True, slots=True)
class Settings:
    """What `transaction()` and `@transactional` were given."""

    propagation: Propagation = Propagation.REQUIRED
    timeout_s: float | None = None
    read_only: bool = False
    wait: Wait | None = None
    rule: RollbackRules = ALWAYS
    retry: Retry | None = None
    manager: Any = None
    final: bool = False
    needs: tuple[Any, ...] = ()
    decide_in: Any = None

    @classmethod
    def make(
        cls,
        propagation: Propagation | str,
        timeout: float | None,
        read_only: bool,
        wait: Wait | str | None,
        rollback_for: Kind | Iterable[Kind],
        no_rollback_for: Kind | Iterable[Kind],
        retry: Retry | int | bool | None,
        manager: Any,
        final: bool = False,
        needs: Iterable[Any] = (),
        decide_in: Any = None,
    ) -> Settings:
        """Check what a user gave; raises `UsageError`."""
        check_timeout(timeout)
        return cls(
            _member(Propagation, "propagation", propagation),
            timeout,
            read_only,
            None if wait is None else _member(Wait, "wait", wait),
            RollbackRules.make(rollback_for, no_rollback_for),
            Retry.make(retry),
            manager,
            final,
            _needed(needs),
            decide_in,
        )

    def plan(self) -> Plan:
        """Return what the scope is going to be, given what is current."""
        existing, propagation = current(), self.propagation
        if existing is not None:
            if propagation is Propagation.NEVER:
                raise TransactionExists(f"propagation NEVER inside transaction {existing.xid}")
            if propagation in _JOINS:
                return Plan.JOIN
        elif propagation is Propagation.MANDATORY:
            raise NoTransaction("propagation MANDATORY outside a transaction: call it inside txrpc.transaction()")
        return Plan.ROOT if propagation in _BEGINS else Plan.OUTSIDE

    def client(self, entry_point: str) -> Any:
        """Return the client of the manager that was given, or the default one; raises `ConfigurationError`."""
        return default_client(entry_point) if self.manager is None else self.manager._client

    def rolls_back(self, error: BaseException) -> bool:
        """Return whether *error*, leaving a root's scope, rolls it back.  What is not an `Exception` always does."""
        return not isinstance(error, Exception) or self.rule.rolls_back(kinds_of(error))


def _needed(given: Any) -> tuple[Any, ...]:
    needs = (given,) if isinstance(given, str) or hasattr(given, "commit_one_phase") else tuple(given)
    for each in needs:
        if not isinstance(each, str) and not isinstance(getattr(each, "name", None), str):
            raise UsageError(f"needs takes resources, or their names, not {each!r}")
    return needs


def _member(kind: Any, name: str, given: Any) -> Any:
    if isinstance(given, kind):
        return given
    try:
        return kind[str(given).upper().replace("-", "_").replace(" ", "_")]
    except KeyError:
        allowed = ", ".join(member.name for member in kind)
        raise UsageError(f"{name} is one of {allowed}, not {given!r}") from None


class BaseScope:
    """One run of a block or of a decorated function.  Its subclasses add how a root ends."""

    entry_point: str

    def __init__(self, settings: Settings, timeout_s: float | None = None) -> None:
        """*timeout_s*: of the root, if it is not that of the settings."""
        self.settings = settings
        self._timeout_s = settings.timeout_s if timeout_s is None else timeout_s
        self.handle: Any = None
        self._plan = Plan.OUTSIDE
        self._entry = False
        self.reads_only = False
        """Whether the scope may only read, though the transaction that it has joined may write elsewhere."""
        self._previous: Any = None

    @property
    def is_root(self) -> bool:
        """Return whether this scope has begun, or was to begin, the transaction."""
        return self._plan is Plan.ROOT

    def open(self) -> None:
        """Decide what this scope is, and begin a root if it is one."""
        self._plan = self.settings.plan()
        if self._plan is Plan.ROOT:
            client = self.settings.client(self.entry_point)
            outer = current()
            settings = self.settings
            self.handle = client.new_root(self._timeout_s, settings.read_only, settings.rule, settings.decide_in)
            if outer is not None:
                self.handle._began_inside(outer)
        elif self._plan is Plan.JOIN:
            outer = current()
            assert outer is not None
            self._entry = outer.enters_first()
            self.handle = outer
            if self._entry and self.settings.final:
                outer.final = True
            self.reads_only = self.settings.read_only or current_reads_only()

    def enter(self) -> Any:
        """Open, and become current."""
        self.open()
        self._previous = set_current(self.handle, self.settings.rule, self.reads_only)
        return self.handle

    def needed(self) -> list[Any]:
        """Return the resources whose connections come first, in an order that is the same in every transaction.

        Raises `UsageError` for one that this process does not have.
        """
        if self.handle is None:
            return []
        known, found = self.handle._client.resources, {}
        for each in self.settings.needs:
            name = each if isinstance(each, str) else each.name
            if name not in known:
                raise UsageError(
                    f"needs={name!r}: this process has no such resource; it has {', '.join(known) or 'none'}"
                )
            found[name] = known[name] if isinstance(each, str) else each
        return [found[name] for name in sorted(found)]

    def verdict(self, error: BaseException | None) -> tuple[bool, Reason | None]:
        """Whether this scope has a root to end, and the reason if it is to roll back; a joined scope tells the outer one."""
        if self._plan is Plan.JOIN and error is not None:
            self.handle.scope_failed(error, self.settings.rule, self._entry)
        if self._plan is not Plan.ROOT or self.handle.ended:
            return False, None
        rolls_back = error is not None and self.settings.rolls_back(error)
        return True, reason_of(error) if rolls_back and error is not None else None


_connected: dict[str, list[Any]] = {"txrpc": [], "txrpc.aio": []}


def refuse_unjoined(args: Iterable[Any]) -> None:
    """Raise `NotJoined` if these are the arguments of a service method that was called with a transaction and did not join it."""
    if current() is not None:
        return
    for argument in args:
        # By its looks: grpc.aio's contexts are of no public class, and tests have contexts of their own.
        ask = getattr(argument, "invocation_metadata", None)
        metadata = ask() if callable(ask) and not inspect.iscoroutinefunction(ask) else None
        if isinstance(metadata, tuple | list) and any(entry[0] == CONTEXT_KEY for entry in metadata):
            raise NotJoined(
                "the call came with a transaction, and this server was built without txrpc's interceptors: "
                "grpc.server(..., interceptors=txrpc.server_interceptors())"
            )


def refuse_undecoratable(fn: Any, entry_point: str, retry: Retry | None) -> None:
    """Raise `UsageError` for what *entry_point*'s `transactional` cannot decorate, or not with a *retry* policy."""
    if isinstance(fn, classmethod | staticmethod):
        kind = type(fn).__name__
        raise UsageError(f"write @{kind} above @transactional, not below it")
    if isinstance(fn, type):
        raise UsageError(f"{fn.__qualname__} is a class: decorate its methods")
    if not callable(fn):
        raise UsageError(f"@transactional decorates a function; timeouts and the like are named: timeout={fn!r}")
    is_async = inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn)
    name = getattr(fn, "__qualname__", repr(fn))
    if is_async and entry_point == "txrpc":
        raise UsageError(f"{name} is asynchronous: decorate it with txrpc.aio.transactional")
    if not is_async and entry_point == "txrpc.aio":
        raise UsageError(f"{name} is not asynchronous: decorate it with txrpc.transactional")
    if retry is not None and is_generator(fn):
        raise UsageError(f"{name} is a generator: what it has yielded cannot be taken back, so no retry=")


def is_generator(fn: Callable[..., Any]) -> bool:
    """True if *fn* is a generator function, synchronous or asynchronous."""
    return inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)


def default_client(entry_point: str) -> Any:
    """The client of the last *entry_point*.connect() in this process that was not closed.

    Raises `ConfigurationError` if there is none.
    """
    if not _connected[entry_point]:
        raise ConfigurationError(f"this process is not connected: call {entry_point}.connect(...) first")
    return _connected[entry_point][-1]


def set_default_client(entry_point: str, manager: Any, on: bool) -> None:
    """Make *manager* the default, or no longer."""
    managers = _connected[entry_point]
    if manager in managers:
        managers.remove(manager)
    if on:
        managers.append(manager)
