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
from txrpc.front_aio import begin, client_interceptors, connect, current_transaction, server_interceptors
from txrpc.runtime.manager_aio import AioJoinedCall as JoinedCall
from txrpc.runtime.manager_aio import AioManager as Manager
from txrpc.runtime.manager_aio import AioTransaction as Transaction
from txrpc.runtime.transactional_aio import transaction, transactional

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
