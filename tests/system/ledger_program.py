"""A root whose ledger decides: python -m tests.system.ledger_program COORDINATOR LEDGER BANK BANK [--final] moves money."""

from __future__ import annotations

import contextlib
import sys

import grpc
import sqlalchemy as sa

import txrpc
import txrpc.sql
from examples.bank import bank_pb2, bank_pb2_grpc

CENTS = 5


def transfer(ledger: txrpc.sql.ResourceManager, banks: list[str], final: bool) -> str:
    """Move money from one bank to the other, with a row in the ledger; return how that ended."""
    interceptors = txrpc.client_interceptors()
    channels = [grpc.intercept_channel(grpc.insecure_channel(bank), *interceptors) for bank in banks]
    stubs = [bank_pb2_grpc.AccountsStub(channel) for channel in channels]
    amount = bank_pb2.Amount(account="0000", cents=CENTS)
    xid = "none"
    try:
        with txrpc.transaction(timeout=5, decide_in=ledger) as tx:
            xid = str(tx.xid)
            with ledger.connection() as connection:
                connection.execute(sa.text("INSERT INTO row VALUES (:xid)"), {"xid": xid})
            with txrpc.final_call() if final else contextlib.nullcontext():
                stubs[0].Withdraw(amount)
                stubs[1].Deposit(amount)
    except txrpc.OutcomeUnknown:
        return f"unknown {xid}"
    except (txrpc.TxrpcError, grpc.RpcError):
        return f"aborted {xid}"
    return f"committed {xid}"


def main(coordinator: str, database: str, *banks: str) -> None:
    engine = sa.create_engine(database)
    ledger = txrpc.sql.ResourceManager("ledger", engine, decides=True)
    with txrpc.connect(coordinator, resources=[ledger], process="ledger program"):
        print("ready", flush=True)
        print("told", transfer(ledger, list(banks), "--final" in sys.argv), flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--final"])
