"""Every exception that txrpc raises, sorted by what the caller may do now.

::

    TxrpcError
    ├── TransactionAborted            nothing was committed; `retryable` says whether running it again may help
    │   └── TransactionTimedOut       ... because its deadline has passed, wherever that was noticed
    ├── OutcomeUnknown                the truth could not be learnt (yet): ask again by XID, do not run it again blindly
    ├── HeuristicOutcome              an operator or a database ended a branch by hand: data may be inconsistent
    ├── Unavailable                   nothing happened: try again later
    │   ├── CoordinatorUnavailable    no live session with the coordinator that is needed
    │   ├── ResourceUnavailable       a database cannot be reached
    │   └── LimitExceeded             a configured limit was reached
    ├── UsageError                    your mistake, in code
    │   ├── IllegalState              e.g. commit of a finished transaction, Session.commit() inside a branch
    │   ├── NoTransaction             MANDATORY without a transaction, ...
    │   ├── TransactionExists         NEVER inside a transaction
    │   ├── CallsInFlight             commit while a call of the transaction is still running
    │   ├── NotJoined                 a call was answered by a server that takes no part in its transaction
    │   ├── ForkedError               a manager was used in a forked child of the process that made it
    │   └── InvalidName
    ├── ConfigurationError            your mistake, in configuration: the message says what to change
    ├── Fenced                        a later epoch of this coordinator has opened its log: this one must stop
    ├── LogBehind                     this coordinator's log has lost decisions: it must stop
    └── BadMessage                    bytes from elsewhere that make no sense

Every error about a transaction carries its `xid` and a `reason`; across gRPC both travel as rich status details
(``google.rpc.ErrorInfo``) and become the same type again at the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from txrpc._enums import NamedIntEnum

if TYPE_CHECKING:
    from txrpc.ids import Xid

__all__ = [
    "AbortCode",
    "BadMessage",
    "CallsInFlight",
    "ConfigurationError",
    "CoordinatorUnavailable",
    "Fenced",
    "ForkedError",
    "HeuristicOutcome",
    "IllegalState",
    "InvalidName",
    "LimitExceeded",
    "LogBehind",
    "NoTransaction",
    "NotJoined",
    "OutcomeUnknown",
    "Reason",
    "ResourceUnavailable",
    "TransactionAborted",
    "TransactionExists",
    "TransactionTimedOut",
    "TxrpcError",
    "Unavailable",
    "UsageError",
    "aborted",
]


class AbortCode(NamedIntEnum):
    """Why a transaction was aborted.  The numbers go over the wire: never reuse one."""

    UNSPECIFIED = 0
    REQUESTED = 1
    APPLICATION_ERROR = 2
    TIMED_OUT = 3
    SERIALIZATION_FAILURE = 4
    DEADLOCK = 5
    LOCK_TIMEOUT = 6
    CANNOT_PREPARE = 7
    STATEMENT_FAILED = 8
    CALLS_DIFFER = 9
    CALL_END_UNKNOWN = 10
    BRANCH_UNKNOWN = 11
    PARTICIPANT_LOST = 12
    RESOURCE_UNAVAILABLE = 13
    COORDINATOR_RESTARTED = 14
    COORDINATOR_UNAVAILABLE = 15
    LOG_UNAVAILABLE = 16
    LIMIT_EXCEEDED = 17
    PRESUMED = 18
    PROTOCOL_VIOLATION = 19
    SHUTTING_DOWN = 20
    NOT_JOINED = 21

    @property
    def retryable(self) -> bool:
        """Whether running the whole transaction again may succeed without any change to the program or its configuration."""
        return self in _RETRYABLE

    @property
    def meaning(self) -> tuple[str, str]:
        """Return what has happened, and what to do."""
        return _MEANING[self]


_AGAIN = "Run the transaction again."
_MEANING = {
    AbortCode.UNSPECIFIED: ("No more is known than the text says.", "Read the text."),
    AbortCode.REQUESTED: ("`rollback()` or `set_rollback_only()` was called.", "Nothing: it was meant."),
    AbortCode.APPLICATION_ERROR: (
        "An exception left the transaction's block, or a joined method failed.",
        "Look at the exception that the text names.",
    ),
    AbortCode.TIMED_OUT: (
        "The transaction's deadline has passed.",
        "Give it more time, or find what waits: a lock, a slow call, a pool that is too small.",
    ),
    AbortCode.SERIALIZATION_FAILURE: ("The database could not serialize the branch with others.", _AGAIN),
    AbortCode.DEADLOCK: ("The database ended a deadlock by this branch.", _AGAIN),
    AbortCode.LOCK_TIMEOUT: ("A lock was not free within the database's `lock_timeout`.", _AGAIN),
    AbortCode.CANNOT_PREPARE: (
        "The database refused PREPARE: temporary tables, LISTEN or NOTIFY, a foreign server.",
        "Move that work out of the transaction.",
    ),
    AbortCode.STATEMENT_FAILED: (
        "A statement failed, and with it the database's transaction.",
        "Use `begin_nested()` around a statement that may fail.",
    ),
    AbortCode.CALLS_DIFFER: (
        "A branch saw other calls than the root: one ran twice, or still runs (rule 9).",
        "Wait for every call before the end; switch transparent retries of calls off.",
    ),
    AbortCode.CALL_END_UNKNOWN: ("How a call ended is not known: a deadline, a cancel, a lost connection.", _AGAIN),
    AbortCode.BRANCH_UNKNOWN: (
        "The service does not know the branch: it restarted, or the branch ended (rule 8).",
        _AGAIN,
    ),
    AbortCode.PARTICIPANT_LOST: ("The process that holds the branch has no session with the coordinator.", _AGAIN),
    AbortCode.RESOURCE_UNAVAILABLE: ("A database cannot be reached.", _AGAIN),
    AbortCode.COORDINATOR_RESTARTED: ("The coordinator has restarted since the transaction began.", _AGAIN),
    AbortCode.COORDINATOR_UNAVAILABLE: ("There is no session with the coordinator.", _AGAIN),
    AbortCode.LOG_UNAVAILABLE: ("The decision could not be recorded, and certainly was not.", _AGAIN),
    AbortCode.LIMIT_EXCEEDED: ("A configured limit was reached.", "Make the transaction smaller, or raise the limit."),
    AbortCode.PRESUMED: ("There is no decision on record, so there was none.", _AGAIN),
    AbortCode.PROTOCOL_VIOLATION: (
        "A message broke the protocol.",
        "Look for different versions of txrpc, or for a program that is not txrpc.",
    ),
    AbortCode.SHUTTING_DOWN: ("The coordinator is shutting down.", _AGAIN),
    AbortCode.NOT_JOINED: (
        "A called server takes no part in the transaction, or does not show that it does (rule 19).",
        "Give the server txrpc's interceptors, or say `outside=` for the method.",
    ),
}

_RETRYABLE = frozenset(
    {
        AbortCode.SERIALIZATION_FAILURE,
        AbortCode.DEADLOCK,
        AbortCode.LOCK_TIMEOUT,
        AbortCode.BRANCH_UNKNOWN,
        AbortCode.PARTICIPANT_LOST,
        AbortCode.CALL_END_UNKNOWN,
        AbortCode.RESOURCE_UNAVAILABLE,
        AbortCode.COORDINATOR_RESTARTED,
        AbortCode.COORDINATOR_UNAVAILABLE,
        AbortCode.LOG_UNAVAILABLE,
        AbortCode.SHUTTING_DOWN,
        AbortCode.PRESUMED,
    }
)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was aborted: a code for programs, a sentence for people (never a secret)."""

    code: AbortCode
    text: str = ""

    @property
    def retryable(self) -> bool:
        """Whether running the whole transaction again may succeed without any change to the program or its configuration."""
        return self.code.retryable

    def __str__(self) -> str:
        name = self.code.name.lower().replace("_", " ")
        return f"{name}: {self.text}" if self.text else name


class TxrpcError(Exception):
    """The root of every exception that txrpc raises."""


class _AboutTransaction(TxrpcError):
    """What every error about one transaction carries."""

    def __init__(self, xid: Xid | None, reason: Reason, message: str | None = None) -> None:
        self.xid = xid
        self.reason = reason
        super().__init__(message or self._sentence())

    def _sentence(self) -> str:
        return str(self.reason)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.xid, self.reason, str(self))


class TransactionAborted(_AboutTransaction):
    """The transaction is rolled back everywhere, or will be: nothing of it was or will be committed."""

    def _sentence(self) -> str:
        return f"transaction {self.xid} was rolled back: {self.reason}"

    @property
    def retryable(self) -> bool:
        """Return whether running the whole transaction again may succeed (``retry=`` does so by itself)."""
        return self.reason.retryable


class TransactionTimedOut(TransactionAborted):
    """The transaction was rolled back because its deadline passed."""


class OutcomeUnknown(_AboutTransaction):
    """Whether the transaction committed could not be learnt.

    It did, or it did not, everywhere alike: ask again with ``manager.outcome(xid)`` when the coordinator is back.
    """

    def _sentence(self) -> str:
        what = self.reason.text or self.reason
        return f"the outcome of transaction {self.xid} is not known: {what}; ask for it with TransactionManager.outcome(xid)"


class HeuristicOutcome(_AboutTransaction):
    """A branch was ended by hand against the decision; the data needs a person's look."""

    def _sentence(self) -> str:
        return f"transaction {self.xid} ended inconsistently: {self.reason.text}"


class Unavailable(TxrpcError):
    """Nothing happened; try again later."""


class CoordinatorUnavailable(Unavailable):
    """There is no live session with the coordinator that is needed."""


class ResourceUnavailable(Unavailable):
    """A database cannot be reached."""


class LimitExceeded(Unavailable):
    """A configured limit was reached; the message names it."""


class UsageError(TxrpcError):
    """The code that uses txrpc is mistaken."""


class IllegalState(UsageError):
    """The operation is not allowed in the transaction's present state."""


class NoTransaction(UsageError):
    """A transaction is needed here and there is none."""


class TransactionExists(UsageError):
    """There must be no transaction here, and there is one."""


class CallsInFlight(UsageError):
    """Commit was asked for while calls of the transaction were still running; it was rolled back."""


class NotJoined(UsageError):
    """A call of a transaction was answered by a server that takes no part in it (rule 19); the transaction can only roll back."""


class ForkedError(UsageError):
    """A manager was used in a forked child of the process that made it."""


class InvalidName(UsageError, ValueError):
    """A name has characters or a length that txrpc does not allow."""


class ConfigurationError(TxrpcError):
    """Something is configured so that it cannot work; the message says what to change."""


class Fenced(TxrpcError):
    """A later epoch of this coordinator node has opened the decision log: this one must stop deciding."""


class LogBehind(TxrpcError):
    """The decision log has lost decisions that a process has heard of: this coordinator must stop deciding."""


class BadMessage(TxrpcError, ValueError):
    """Bytes from elsewhere that make no sense."""


def aborted(xid: Xid | None, reason: Reason) -> TransactionAborted:
    """The `TransactionAborted` that fits *reason*."""
    kind = TransactionTimedOut if reason.code is AbortCode.TIMED_OUT else TransactionAborted
    return kind(xid, reason)
