"""What a resource does where there is no transaction."""

from __future__ import annotations

from typing import Any

from txrpc.errors import ConfigurationError, NoTransaction

__all__ = ["check_outside", "refuse_outside"]


def refuse_outside(resource: Any, outside: str | None, several: bool = False) -> None:
    """Raise `NoTransaction` if *resource* is not to be used outside a transaction: there it would commit by itself (rule 19).

    *several*: it is to be used together with others.
    """
    if several:
        raise NoTransaction(
            f"a session over resource {resource.name!r} and others is used outside a transaction, where their databases would "
            "commit one after the other: use txrpc.transaction"
        )
    serves = getattr(resource.user, "serves", False)
    if outside == "local" or (outside is None and not serves):
        return
    raise NoTransaction(
        f"resource {resource.name!r} is used outside a transaction, where what it writes stays even if its caller rolls back: use "
        "txrpc.transactional, take the transaction along into threads with txrpc.carry, or say that this is meant with "
        "ResourceManager(..., outside='local')"
    )


def check_outside(name: str, outside: str | None) -> str | None:
    """*outside*, if it is one of the words that there are."""
    if outside not in (None, "local", "refuse"):
        raise ConfigurationError(f"resource {name!r}: outside is 'local' or 'refuse', not {outside!r}")
    return outside
