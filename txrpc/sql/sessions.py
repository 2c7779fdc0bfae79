"""The sessions of branches: they do not commit, and a rollback of one is the transaction's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import FrameType, ModuleType
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from txrpc.errors import AbortCode, ConfigurationError, IllegalState, Reason
from txrpc.sql.common import work_of

__all__ = ["check_session_commit", "watch_session"]

logger = logging.getLogger("txrpc.sql")


def refuse_commit(session: Session) -> None:
    """A listener for ``before_commit`` of a session in a branch.  Savepoints may be released."""
    if not session.in_nested_transaction():
        raise IllegalState(
            "Session.commit() inside a transaction: the session is flushed at the end of its block, and commits with its "
            "transaction; use begin_nested() for a savepoint, or for code that cannot be changed yet "
            "ResourceManager(..., session_commit='flush')"
        )


def flush_instead(session: Session) -> None:
    """A listener for ``before_commit``, instead of `refuse_commit`: SQLAlchemy flushes, and commits nothing but savepoints."""
    if not session.in_nested_transaction():
        logger.warning("Session.commit() inside a transaction was a flush: %s", _line_of_the_caller())


def _line_of_the_caller() -> str:
    """The line outside of SQLAlchemy and txrpc: what is to be changed one day."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(("sqlalchemy.", "txrpc.")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}" if frame is not None else "caller unknown"


def check_session_commit(name: str, session_commit: str) -> str:
    """*session_commit*, if it is one of the words that there are."""
    if session_commit not in ("refuse", "flush"):
        raise ConfigurationError(f"resource {name!r}: session_commit is 'refuse' or 'flush', not {session_commit!r}")
    return session_commit


def watch_session(session: Session, info: Mapping[Any, Any], dialect: ModuleType, session_commit: str) -> None:
    """*session* is in a branch, whose connection has *info*: it does not commit, and a rollback of it is the transaction's.

    Also one before its first statement, of which the connection hears nothing.
    """
    work = work_of(info)
    assert work is not None

    def rolled_back(_session: Session, previous: SessionTransaction) -> None:
        if previous.nested or work.ours or work.connection.invalidated:
            return
        error = sys.exception()
        reason = dialect.classify(error) if error is not None else None
        work.doom = work.doom or reason or Reason(AbortCode.REQUESTED, "Session.rollback() was called in a transaction")

    if session_commit == "refuse":
        # A session that has begun nothing has nothing to roll back, and no event; its user means the transaction all the same.
        roll_back = session.rollback

        def rollback() -> None:
            if not session.in_transaction():
                work.doom = work.doom or Reason(AbortCode.REQUESTED, "Session.rollback() was called in a transaction")
            roll_back()

        session.rollback = rollback  # type: ignore[method-assign]
    event.listen(session, "before_commit", flush_instead if session_commit == "flush" else refuse_commit)
    event.listen(session, "after_soft_rollback", rolled_back)
