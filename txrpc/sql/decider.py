"""What makes a SQL database decide transactions: its register, and the commit that writes into it.  For `Engine`s."""

# Written by scripts/twins.py from decider_async.py: change that one.

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

from txrpc._client.flow import run
from txrpc._protocol.outcomes import Found, Outcome
from txrpc.errors import ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql import deciding
from txrpc.sql.deciding import Decided, Hands
from txrpc.sql.register import Register, Row

__all__ = ["Decider"]

_HORIZON_MS: Final = 24 * 3_600_000
"""How long what is over is remembered for branches that come back late; longer than that an operator must look."""
_FORGET_AT_ONCE: Final = 5_000


class Decider:
    """See `txrpc.resource.Decider`."""

    def __init__(self, resource: str, hands: Hands) -> None:
        """*hands*: how to reach the branches' connections, and others."""
        self._resource = resource
        self._hands = hands
        self._opened: Register | None = None

    def open(self) -> RegisterId:
        """See `txrpc.resource.Decider.open`."""
        self._opened = self._hands.aside(self._hands.dialect.open_register, self._resource)
        return self._register.id

    @property
    def _register(self) -> Register:
        if self._opened is None:
            raise ResourceUnavailable(f"resource {self._resource!r} is not ready")
        return self._opened

    def decide(self, work: Any, xid: Xid, register: RegisterId, branches: bytes) -> Outcome | None:
        """See `txrpc.resource.Decider.decide`."""
        found = run(deciding.decide(self._hands, self._register, self._resource, work, xid, register, branches))
        return _OUTCOMES[found]

    def how_it_was_decided(self, work: Any, xid: Xid, register: RegisterId) -> Outcome | None:
        """See `txrpc.resource.Decider.how_it_was_decided`."""
        return _OUTCOMES[run(deciding.settle(self._hands, self._register, work, xid, register))]

    def ask(self, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None) -> tuple[Found, bytes]:
        """See `txrpc.resource.Decider.ask`."""
        row: Row = self._hands.aside(self._register.ask, register, xid, claim, commit)
        return row.found, row.branches

    def undone(self) -> Sequence[tuple[Xid, bytes]]:
        """See `txrpc.resource.Decider.undone`."""
        found: Sequence[tuple[Xid, bytes]] = self._hands.aside(self._register.undone)
        return found

    def mark_done(self, xids: Collection[Xid]) -> None:
        """See `txrpc.resource.Decider.mark_done`."""
        self._hands.aside(self._register.done, xids)

    def forget(self) -> None:
        """See `txrpc.resource.Decider.forget`."""
        while self._hands.aside(self._register.forget, _HORIZON_MS, _FORGET_AT_ONCE) == _FORGET_AT_ONCE:
            pass


_OUTCOMES: Final[dict[Decided | None, Outcome | None]] = {
    Decided.COMMITTED: Outcome.COMMITTED,
    Decided.ABORTED: Outcome.ABORTED,
    # Its root decides once, and has been refused: nothing and no one else can write COMMITTED any more.
    Decided.REFUSED: Outcome.ABORTED,
    Decided.LOST: Outcome.UNKNOWN,
    None: None,
}
