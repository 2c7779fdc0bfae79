"""Which failures roll a transaction back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from txrpc.errors import UsageError

__all__ = ["ALWAYS", "Kind", "RollbackRules", "kinds_of"]

Kind = Any
"""An exception type, or a `grpc.StatusCode`."""


@dataclass(frozen=True, slots=True)
class RollbackRules:
    """What a failure means for the transaction: by default every one rolls it back.

    `rollback_for` wins over `no_rollback_for`.  Both name exception types (subclasses match) and gRPC status codes.
    """

    rollback_for: tuple[Kind, ...] = ()
    no_rollback_for: tuple[Kind, ...] = ()

    @classmethod
    def make(
        cls, rollback_for: Kind | Iterable[Kind] = (), no_rollback_for: Kind | Iterable[Kind] = ()
    ) -> RollbackRules:
        """Build a rule from single kinds or iterables of them; raises `UsageError` for what is neither type nor status."""
        if rollback_for == () and no_rollback_for == ():
            return ALWAYS
        return cls(_checked("rollback_for", rollback_for), _checked("no_rollback_for", no_rollback_for))

    def rolls_back(self, kinds: tuple[object, ...]) -> bool:
        """Return whether a failure that shows itself as *kinds* (an exception, a status code) rolls the transaction back."""
        return self.requires_rollback(kinds) or not _matches(self.no_rollback_for, kinds)

    def requires_rollback(self, kinds: tuple[object, ...]) -> bool:
        """Return whether `rollback_for` names one of *kinds*."""
        return _matches(self.rollback_for, kinds)


ALWAYS = RollbackRules()
"""Every failure rolls back."""


def kinds_of(error: BaseException) -> tuple[object, ...]:
    """Return what a rule may name about *error*: itself, and its gRPC status if it has one."""
    code = getattr(error, "code", None)
    if not callable(code):
        return (error,)
    try:
        return error, code()
    except Exception:  # a `code` that is not gRPC's
        return (error,)


def _matches(named: tuple[Kind, ...], kinds: tuple[object, ...]) -> bool:
    for kind in named:
        for seen in kinds:
            if isinstance(seen, kind) if isinstance(kind, type) else seen is kind:
                return True
    return False


def _checked(name: str, kinds: Kind | Iterable[Kind]) -> tuple[Kind, ...]:
    listed = tuple(kinds) if isinstance(kinds, list | tuple | set | frozenset) else (kinds,)
    for kind in listed:
        is_error = isinstance(kind, type) and issubclass(kind, BaseException)
        if not is_error and type(kind).__name__ != "StatusCode":
            raise UsageError(f"{name} takes exception types and grpc.StatusCode members, not {kind!r}")
    return listed
