"""The names of `txrpc` for asyncio programs."""

from txrpc import (
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
    Outcome,
    OutcomeUnknown,
    Propagation,
    Reason,
    ResourceUnavailable,
    Retry,
    SessionOptions,
    Status,
    TransactionAborted,
    TransactionExists,
    TransactionTimedOut,
    TxrpcError,
    Unavailable,
    UsageError,
    Wait,
    Xid,
    carry,
)
from txrpc._client.manager_async import AsyncJoinedCall as JoinedCall
from txrpc._client.manager_async import AsyncManager as Manager
from txrpc._client.manager_async import AsyncTransaction as Transaction
from txrpc._client.transactional_async import transaction, transactional
from txrpc._connect_async import begin, client_interceptors, connect, current_transaction, server_interceptors

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
    "JoinedCall",
    "LimitExceeded",
    "Manager",
    "NoTransaction",
    "NotJoined",
    "Outcome",
    "OutcomeUnknown",
    "Propagation",
    "Reason",
    "ResourceUnavailable",
    "Retry",
    "SessionOptions",
    "Status",
    "Transaction",
    "TransactionAborted",
    "TransactionExists",
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
    "server_interceptors",
    "transaction",
    "transactional",
]

for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith("txrpc."):
        globals()[_name].__module__ = "txrpc.aio"  # what tracebacks and pickles say
del _name
