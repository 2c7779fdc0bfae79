"""Transactions over several gRPC services and their databases: all of it commits, or none of it does, whatever crashes.

The names for synchronous programs; `txrpc.aio` has the same for asyncio.  Start with `connect`, `transaction` and
`transactional`; the databases are in `txrpc.sql`.
"""

from txrpc._client.local_transaction import Status, TransactionEvent
from txrpc._client.manager import TransactionManager
from txrpc._client.retry import FailedAttempt, Retry
from txrpc._client.scope import Propagation
from txrpc._client.state import ManagerStatus
from txrpc._client.transaction import JoinedTransaction, RootTransaction
from txrpc._client.transaction_base import Transaction
from txrpc._client.transactional import transaction, transactional
from txrpc._connect import (
    begin,
    client_interceptors,
    connect,
    current_transaction,
    intercept_channel,
    server_interceptors,
)
from txrpc._context import carry, final_call
from txrpc._embedded import embedded
from txrpc._protocol.messages import Outcome, Wait
from txrpc.errors import (
    AbortCode,
    BadMessage,
    CallsInFlight,
    ConfigurationError,
    CoordinatorUnavailable,
    Fenced,
    ForkedError,
    HeuristicOutcome,
    IllegalState,
    InvalidName,
    LimitExceeded,
    NotJoined,
    NoTransaction,
    OutcomeUnknown,
    Reason,
    ResourceUnavailable,
    TransactionAborted,
    TransactionExists,
    TransactionTimedOut,
    TxrpcError,
    Unavailable,
    UsageError,
)
from txrpc.ids import Xid
from txrpc.options import SessionOptions

__version__ = "0.1.0"

__all__ = [
    "AbortCode",
    "BadMessage",
    "CallsInFlight",
    "ConfigurationError",
    "CoordinatorUnavailable",
    "FailedAttempt",
    "Fenced",
    "ForkedError",
    "HeuristicOutcome",
    "IllegalState",
    "InvalidName",
    "JoinedTransaction",
    "LimitExceeded",
    "ManagerStatus",
    "NoTransaction",
    "NotJoined",
    "Outcome",
    "OutcomeUnknown",
    "Propagation",
    "Reason",
    "ResourceUnavailable",
    "Retry",
    "RootTransaction",
    "SessionOptions",
    "Status",
    "Transaction",
    "TransactionAborted",
    "TransactionEvent",
    "TransactionExists",
    "TransactionManager",
    "TransactionTimedOut",
    "TxrpcError",
    "Unavailable",
    "UsageError",
    "Wait",
    "Xid",
    "begin",
    "carry",
    "client_interceptors",
    "connect",
    "current_transaction",
    "embedded",
    "final_call",
    "intercept_channel",
    "server_interceptors",
    "transaction",
    "transactional",
]

for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith("txrpc."):
        globals()[_name].__module__ = "txrpc"  # what tracebacks and pickles say
del _name
