"""The checkers of histories find what is planted, each its own, and are silent about a history that is fine."""

from __future__ import annotations

import pytest

from tests.histories.checkers import Append, Ended, History, Read, Transaction, mistakes

X, Y, Z = ("a", "x"), ("a", "y"), ("b", "z")
DONE, UNDONE, UNKNOWN = Ended.COMMITTED, Ended.ABORTED, Ended.UNKNOWN


def history(final: dict[tuple[str, str], tuple[int, ...]], *transactions: Transaction) -> History:
    return History(list(transactions), final)


def test_a_history_in_which_all_is_well() -> None:
    fine = history(
        {X: (1, 3, 5), Y: (2, 6), Z: (4,)},
        Transaction("t1", (Append(X, 1), Append(Y, 2), Read(X, (1,))), DONE),
        Transaction("t2", (Read(X, (1,)), Append(X, 3), Append(Z, 4)), UNKNOWN),
        Transaction("t3", (Append(X, 7), Append(Z, 8)), UNDONE),
        Transaction("t4", (Append(X, 5), Append(Y, 6), Read(X, (1, 3, 5))), DONE),
    )
    assert mistakes(fine) == []


PLANTED = {
    "half": history({X: (1,), Z: ()}, Transaction("t1", (Append(X, 1), Append(Z, 2)), UNKNOWN)),
    "lost": history({X: ()}, Transaction("t1", (Append(X, 1),), DONE)),
    "G1a: t1 was told": history({X: (1,)}, Transaction("t1", (Append(X, 1),), UNDONE)),
    "G1a: t2 read (1,)": history(
        {X: ()}, Transaction("t1", (Append(X, 1),), UNDONE), Transaction("t2", (Read(X, (1,)),), DONE)
    ),
    "nobody wrote 9": history({X: (9,)}, Transaction("t1", (Read(X, (9,)),), DONE)),
    "G1b": history(
        {X: (1, 2)}, Transaction("t1", (Append(X, 1), Append(X, 2)), DONE), Transaction("t2", (Read(X, (1,)),), DONE)
    ),
    "order": history(
        {X: (1, 2)},
        Transaction("t1", (Append(X, 1),), DONE),
        Transaction("t2", (Append(X, 2),), DONE),
        Transaction("t3", (Read(X, (2,)),), DONE),
    ),
    "twice": history({X: (1, 1)}, Transaction("t1", (Append(X, 1),), DONE)),
    "G0": history(
        {X: (1, 2)},
        Transaction("t1", (Append(X, 1), Read(X, (1, 2))), DONE),
        Transaction("t2", (Append(X, 2),), DONE),
    ),
    "G1c: in a": history(
        {X: (1, 3), Y: (4, 2)},
        Transaction("t1", (Append(X, 1), Append(Y, 2)), DONE),
        Transaction("t2", (Append(X, 3), Append(Y, 4)), DONE),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str) -> None:
    found = mistakes(PLANTED[name])
    assert any(name in mistake for mistake in found), found


def test_a_circle_through_two_databases_is_no_mistake() -> None:
    """Neither database can know the other's order: that is what the lack of a common snapshot means."""
    across = history(
        {X: (1, 3), Z: (4, 2)},
        Transaction("t1", (Append(X, 1), Append(Z, 2)), DONE),
        Transaction("t2", (Append(X, 3), Append(Z, 4)), DONE),
    )
    assert mistakes(across) == []
