"""Every exception that txrpc raises, sorted by what the caller may do now.

::

    TxrpcError
    ├── TransactionAborted            nothing was committed; `retryable` says whether running it again may help
    │   └── TransactionTimedOut       ... because its time was up
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
    REQUESTED = 1  # rollback() or set_rollback_only()
    APPLICATION_ERROR = 2  # an exception left the transaction's block, or a joined method failed
    TIMED_OUT = 3
    SERIALIZATION_FAILURE = 4
    DEADLOCK = 5
    LOCK_TIMEOUT = 6
    CANNOT_PREPARE = 7  # the database refused PREPARE: temporary tables, LISTEN / NOTIFY, ...
    STATEMENT_FAILED = 8  # a statement failed, and with it the database transaction
    CALLS_DIFFER = 9  # rule 9: a call ran twice, or is still running
    CALL_END_UNKNOWN = 10  # a call's end is not known: deadline, cancel, lost connection
    BRANCH_UNKNOWN = 11  # rule 8: the participant does not know the branch (it restarted, or the branch ended)
    PARTICIPANT_LOST = 12  # no session with the process that holds the branch
    RESOURCE_UNAVAILABLE = 13
    COORDINATOR_RESTARTED = 14  # the transaction began under an earlier epoch
    COORDINATOR_UNAVAILABLE = 15
    LOG_UNAVAILABLE = 16  # the decision could not be recorded, and certainly was not
    LIMIT_EXCEEDED = 17
    PRESUMED = 18  # no decision on record
    PROTOCOL_VIOLATION = 19
    SHUTTING_DOWN = 20
    NOT_JOINED = 21  # rule 19: a call did not take the transaction along, or nobody can see whether it did


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
        """Whether running the whole transaction again may succeed without anybody changing anything."""
        return self.code in _RETRYABLE

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
        """Whether running the whole transaction again may succeed (``retry=`` does so by itself)."""
        return self.reason.retryable


class TransactionTimedOut(TransactionAborted):
    """The transaction was rolled back because its deadline passed."""


class OutcomeUnknown(_AboutTransaction):
    """Whether the transaction committed could not be learnt.

    It did, or it did not, everywhere alike: ask again with ``manager.outcome(xid)`` when the coordinator is back.
    """

    def _sentence(self) -> str:
        return f"the outcome of transaction {self.xid} is not known: {self.reason.text or self.reason}"


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
