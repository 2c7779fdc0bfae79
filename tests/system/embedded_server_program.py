"""A program with a coordinator that serves, and moves money: python -m tests.system.embedded_server_program LOG ... BANK BANK."""

from __future__ import annotations

import argparse
import threading

import grpc

import txrpc
from examples.bank import bank_pb2, bank_pb2_grpc


@txrpc.transactional(timeout=10, retry=txrpc.Retry(within_s=60))
def transfer(first: bank_pb2_grpc.AccountsStub, second: bank_pb2_grpc.AccountsStub) -> None:
    """Services find a coordinator that has started after them in a moment."""
    amount = bank_pb2.Amount(account="0000", cents=100)
    first.Withdraw(amount)
    second.Deposit(amount)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("banks", nargs=2)
    given = parser.parse_args()
    with txrpc.embedded(given.log, listen=given.listen, process="program"):
        print("ready", flush=True)
        if given.wait:
            threading.Event().wait()
        channels = [grpc.intercept_channel(grpc.insecure_channel(a), *txrpc.client_interceptors()) for a in given.banks]
        first, second = (bank_pb2_grpc.AccountsStub(channel) for channel in channels)
        transfer(first, second)
        print("told committed", flush=True)


if __name__ == "__main__":
    main()
