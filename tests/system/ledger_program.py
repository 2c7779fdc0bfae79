"""A root that moves money from one bank to the other, in a transaction that a database decides.

That is a ledger of its own, into which it writes a row; or, with --decided-by, that of a bank's.
"""

from __future__ import annotations

import argparse
import contextlib

import grpc
import sqlalchemy as sa

import txrpc
import txrpc.sql
from examples.bank import bank_pb2, bank_pb2_grpc
from tests.waiting import eventually

CENTS = 5


def transfer(decider: txrpc.sql.ResourceManager | str, banks: list[str], final: bool) -> str:
    """Move money from one bank to the other; return how that ended."""
    interceptors = txrpc.client_interceptors()
    channels = [grpc.intercept_channel(grpc.insecure_channel(bank), *interceptors) for bank in banks]
    stubs = [bank_pb2_grpc.AccountsStub(channel) for channel in channels]
    amount = bank_pb2.Amount(account="0000", cents=CENTS)
    xid = "none"
    try:
        with txrpc.transaction(timeout=5, decide_in=decider) as tx:
            xid = str(tx.xid)
            if not isinstance(decider, str):
                with decider.connection() as connection:
                    connection.execute(sa.text("INSERT INTO entry VALUES (:xid)"), {"xid": xid})
            with txrpc.final_call() if final else contextlib.nullcontext():
                stubs[0].Withdraw(amount)
                stubs[1].Deposit(amount)
    except txrpc.OutcomeUnknown:
        return f"unknown {xid}"
    except (txrpc.TxrpcError, grpc.RpcError):
        return f"aborted {xid}"
    return f"committed {xid}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("coordinator")
    parser.add_argument("banks", nargs=2)
    parser.add_argument("--ledger", help="the URL of its database")
    parser.add_argument("--decided-by", help="a resource of one of the banks")
    parser.add_argument("--final", action="store_true")
    arguments = parser.parse_args()
    ledgers = []
    if arguments.ledger:
        ledgers.append(txrpc.sql.ResourceManager("ledger", sa.create_engine(arguments.ledger), decides=True))
    with txrpc.connect(arguments.coordinator, resources=ledgers, process="ledger program") as manager:
        if not ledgers:
            eventually(lambda: arguments.decided_by in manager._client.state.registers)
        print("ready", flush=True)
        decider = ledgers[0] if ledgers else arguments.decided_by
        print("told", transfer(decider, arguments.banks, arguments.final), flush=True)


if __name__ == "__main__":
    main()
