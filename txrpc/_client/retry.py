"""Running a root transaction again, as a whole, while there is time.

Nothing of an attempt that failed is left: its transaction is rolled back, or nothing was sent.  What may help is decided by the
reason (`AbortCode.retryable`): a conflict in a database, a lock that was not free, a service, a database or a coordinator that
restarted.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from txrpc._client.core import DEFAULT_TIMEOUT_S
from txrpc._client.flow import Flow
from txrpc._client.local_transaction import Status
from txrpc._client.state import Runtime
from txrpc._client.transaction_base import Transaction
from txrpc.errors import AbortCode, CoordinatorUnavailable, TransactionAborted, TxrpcError, Unavailable, UsageError

__all__ = ["Attempts", "FailedAttempt", "Retry"]

_CONFLICTS = frozenset({AbortCode.SERIALIZATION_FAILURE, AbortCode.DEADLOCK, AbortCode.LOCK_TIMEOUT})


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """What `Retry.before_retry` is called with.

    number: which attempt failed, from 1.
    error: what it raised.
    pause_s: seconds until the next one begins; longer if the coordinator has to come back first.
    elapsed_s, left_s: seconds since the first attempt began, and until no other may begin.
    """

    number: int
    error: Exception
    pause_s: float
    elapsed_s: float
    left_s: float


@dataclass(frozen=True, slots=True)
class Retry:
    """Run a whole root transaction again while that may help (see `TransactionAborted.retryable`), also when nothing was sent.

    within_s: seconds for all attempts and pauses together; by default the transaction's timeout.  A later attempt gets as its own
        timeout what is left of them, if that is less.
    attempts: how many may run into a conflict with other transactions: a serialization failure, a deadlock, a lock time-out.  By
        default as many as fit into the time.  Attempts that found a coordinator, a service or a database out of reach do not
        count.
    backoff_s: before the second attempt sleep a random time up to this many seconds; doubled for each further one.
    max_backoff_s: the longest sleep.
    before_retry: called with a `FailedAttempt` before each sleep, to log or to count; in an asyncio program it may be a coroutine
        function.  What it raises ends the attempts.

    While there is no session with the coordinator the next attempt waits for it, instead of failing at once.
    """

    attempts: int | None = None
    backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    within_s: float | None = None
    before_retry: Callable[[FailedAttempt], Any] | None = None

    def __post_init__(self) -> None:
        too_few = self.attempts is not None and self.attempts < 1
        if (
            too_few
            or self.backoff_s < 0
            or self.max_backoff_s < 0
            or (self.within_s is not None and self.within_s <= 0)
        ):
            raise UsageError(f"not a retry policy: {self!r}")

    @classmethod
    def make(cls, given: Retry | int | bool | None) -> Retry | None:
        """Return the policy that a user gave: a number is `attempts`, True the default policy.  Raises `UsageError`."""
        if given is None or given is False:
            return None
        if given is True:
            return cls()
        if isinstance(given, int):
            return cls(attempts=given)
        if not isinstance(given, Retry):
            raise UsageError(f"retry is a txrpc.Retry, True, or how often to try at most, not {given!r}")
        return given

    def sleep_s(self, attempt: int) -> float:
        """Return how long to sleep after *attempt* (from 1) failed: full jitter, so that rivals part."""
        # Beyond 2 ** 30 the power only costs time.
        limit: float = min(self.max_backoff_s, self.backoff_s * 2 ** min(attempt - 1, 30))
        return limit * random.random()


class Attempts:
    """The runs of one call of a decorated function.  Not thread-safe: one call belongs to one thread or task."""

    def __init__(
        self, policy: Retry | None, timeout_s: float | None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._own_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        self._now_s = now_s
        self._began_s = now_s()
        self._number = 1
        self._conflicts = 0
        self._failed: FailedAttempt | None = None

    def _left_s(self) -> float:
        within_s = self._policy.within_s if self._policy is not None else None
        return self._began_s + (self._own_s if within_s is None else within_s) - self._now_s()

    def timeout_s(self) -> float | None:
        """Return the timeout of the attempt that begins now; None is the default one."""
        if self._policy is None or (self._number == 1 and self._policy.within_s is None):
            return self._timeout_s
        return min(self._own_s, max(0.001, self._left_s()))

    def may_go_on(self, error: Exception, transaction: Transaction | None) -> bool:
        """Take the end of an attempt; return whether another one follows, after `rest`."""
        if self._policy is None or not _retryable(error, transaction):
            return self._give_up(error)
        self._conflicts += _is_conflict(error, transaction)
        if self._policy.attempts is not None and self._conflicts >= self._policy.attempts:
            return self._give_up(error)
        pause_s, left_s = self._policy.sleep_s(self._number), self._left_s()
        if pause_s >= left_s:
            return self._give_up(error)
        elapsed_s = self._now_s() - self._began_s
        self._failed = FailedAttempt(self._number, error, pause_s, elapsed_s, left_s)
        self._number += 1
        return True

    def rest(self, runtime: Runtime) -> Flow[None]:
        """Tell `before_retry`, and sleep before the next attempt; without a session, until there is one.

        Raises the error of the attempt that failed if there was none in time.
        """
        assert self._policy is not None
        assert self._failed is not None
        if self._policy.before_retry is not None:
            yield self._policy.before_retry, (self._failed,)
        yield runtime.pause, (self._failed.pause_s,)
        if isinstance(self._failed.error, CoordinatorUnavailable):
            with contextlib.suppress(TxrpcError):  # the next attempt says it better
                yield runtime.reconnect, ("", max(0.0, self._left_s()))
            if self._left_s() <= 0:
                raise self._failed.error

    def _give_up(self, error: Exception) -> bool:
        if self._failed is not None:
            elapsed_s, last = self._now_s() - self._began_s, self._failed.error
            before = f"{type(last).__name__}: {last}"
            error.add_note(f"attempt {self._number} in {elapsed_s:.1f} s; the one before failed with {before}")
        return False


def _retryable(error: Exception, transaction: Transaction | None) -> bool:
    if isinstance(error, TransactionAborted):
        return error.retryable
    if isinstance(error, Unavailable | UsageError):
        return isinstance(error, Unavailable)
    if transaction is None or transaction.doom is None:
        return False
    return transaction.doom.retryable and transaction.status is Status.ROLLED_BACK


def _is_conflict(error: Exception, transaction: Transaction | None) -> bool:
    reason = (
        error.reason if isinstance(error, TransactionAborted) else None if transaction is None else transaction.doom
    )
    return reason is not None and reason.code in _CONFLICTS
