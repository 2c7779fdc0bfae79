"""The error tree: drawn as it is, and every leaf can cross a process boundary."""

from __future__ import annotations

import pickle
import re

import pytest

from txrpc import errors as e
from txrpc.ids import Xid

ABOUT = (e.TransactionAborted, e.OutcomeUnknown, e.HeuristicOutcome)
KINDS = [kind for name in e.__all__ if isinstance(kind := getattr(e, name), type) and issubclass(kind, e.TxrpcError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[e.TxrpcError]) -> None:
    """multiprocessing and concurrent.futures send them between processes."""
    reason = e.Reason(e.AbortCode.DEADLOCK, "both waited")
    error = kind(Xid(bytes(16)), reason) if issubclass(kind, ABOUT) else kind("a sentence")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert getattr(back, "reason", None) == getattr(error, "reason", None)
    assert getattr(back, "xid", None) == getattr(error, "xid", None)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", e.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in KINDS} - {"TxrpcError"}


def test_a_timeout_is_an_abort_of_its_own_kind() -> None:
    assert type(e.aborted(None, e.Reason(e.AbortCode.TIMED_OUT))) is e.TransactionTimedOut
    assert type(e.aborted(None, e.Reason(e.AbortCode.DEADLOCK))) is e.TransactionAborted


def test_only_what_nobody_need_change_is_retryable() -> None:
    retryable = {code.name for code in e.AbortCode if e.Reason(code).retryable}
    assert {"SERIALIZATION_FAILURE", "DEADLOCK", "LOCK_TIMEOUT", "COORDINATOR_RESTARTED"} <= retryable
    assert (
        not {"APPLICATION_ERROR", "REQUESTED", "CANNOT_PREPARE", "STATEMENT_FAILED", "PROTOCOL_VIOLATION", "TIMED_OUT"}
        & retryable
    )


def test_reasons_read_as_sentences() -> None:
    assert str(e.Reason(e.AbortCode.LOCK_TIMEOUT)) == "lock timeout"
    assert str(e.TransactionAborted(Xid(bytes(16)), e.Reason(e.AbortCode.DEADLOCK, "x"))).endswith(
        "was rolled back: deadlock: x"
    )
