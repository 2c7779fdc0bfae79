"""What every register does with a decision that has no work: the same for each kind of database."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.engine import Connection

from txrpc._protocol.outcomes import Found
from txrpc.ids import Xid
from txrpc.sql.register import Register, Row

__all__ = ["check_decisions_without_work", "check_the_race_for_a_row"]

LIST = b"two branches"
LATER_MS = -1_000_000
"""A horizon behind which everything is that was made until now."""


def check_decisions_without_work(register: Register, aside: Connection, xids: Sequence[Xid]) -> None:
    """The row alone is the decision, unless there is one; and it is forgotten like any other."""
    one, two, three, four = xids

    def decide(which: Xid, branches: bytes) -> Row:
        return register.ask(aside, register.id, which, True, branches)

    assert decide(one, LIST) == decide(one, LIST) == Row(Found.COMMITTED, LIST)
    assert register.ask(aside, register.id, one, True) == Row(Found.COMMITTED, LIST), "a claim comes too late"
    assert register.ask(aside, register.id, two, True) == Row(Found.ABORTED)
    assert decide(two, LIST) == Row(Found.ABORTED), "it comes too late"
    assert decide(three, b"") == Row(Found.COMMITTED)
    assert list(register.undone(aside)) == [(one, LIST)], "what lists nothing is done"
    register.done(aside, [one])
    register.forget(aside, LATER_MS, 100)
    assert decide(two, LIST) == decide(four, LIST) == Row(Found.FORGOTTEN)
    assert not register.undone(aside)


def check_the_race_for_a_row(ask: Callable[[Xid, bytes | None], Found], xids: Sequence[Xid]) -> None:
    """*ask* decides, or claims with None, on a connection of its own: however many do both, all hear one word."""
    dice = random.Random(1)
    asked = [(which, branches) for which in xids for branches in (LIST, LIST, None, None)]
    dice.shuffle(asked)
    asked.sort(key=lambda each: each[0])
    with ThreadPoolExecutor(4) as pool:
        heard = [(which, pool.submit(ask, which, branches)) for which, branches in asked]
    told = {which: {each.result() for one, each in heard if one == which} for which in xids}
    assert all(len(words) == 1 for words in told.values()), told
    assert set().union(*told.values()) == {Found.COMMITTED, Found.ABORTED}
