"""The business logic: a transfer between two banks is two calls in one transaction.

python -m examples.bank.teller --coordinator 127.0.0.1:7400 --banks 127.0.0.1:7501 127.0.0.1:7502 --transfers 1000
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

import txrpc
from examples.bank import bank_pb2, bank_pb2_grpc


class Teller:
    """Knows the banks, and moves money between them."""

    def __init__(self, banks: Sequence[str], *, final: bool = False, decider: str = "") -> None:
        """*final*: tell each bank that it is called no more, so that its vote comes with its reply.

        *decider*: the resource of the last bank, which then decides: the transaction has committed when it replies.
        """
        self._final = final
        self.decider = decider
        self._channels = [
            grpc.intercept_channel(grpc.insecure_channel(bank), *txrpc.client_interceptors()) for bank in banks
        ]
        self.banks = [bank_pb2_grpc.AccountsStub(channel) for channel in self._channels]

    @txrpc.transactional(timeout=10, retry=txrpc.Retry(within_s=60))
    def transfer(self, source: int, source_account: str, target: int, target_account: str, cents: int) -> None:
        """Move *cents* from an account of one bank to an account of another: both change, or neither does.

        The banks are called in the same order always.  Two transfers that lock the same accounts in opposite order would wait
        for each other until their deadline, and neither database could see why.
        """
        withdraw = functools.partial(self.banks[source].Withdraw, bank_pb2.Amount(account=source_account, cents=cents))
        deposit = functools.partial(self.banks[target].Deposit, bank_pb2.Amount(account=target_account, cents=cents))
        first, last = (withdraw, deposit) if source < target else (deposit, withdraw)
        with txrpc.final_call() if self._final or self.decider else contextlib.nullcontext():
            first()
            if not self.decider:
                last()
        if self.decider:
            with txrpc.final_call(decides=True):
                last()

    def total(self) -> int:
        """The money of all banks together, in cents."""
        return sum(bank.Total(bank_pb2.TotalRequest()).cents for bank in self.banks)

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            channel.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--banks", nargs="+", required=True)
    parser.add_argument("--accounts", type=int, default=100, help="of each bank, as its service was started")
    parser.add_argument("--transfers", type=int, default=100)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()

    with txrpc.connect(arguments.coordinator, process="teller"):
        teller = Teller(arguments.banks)
        before = teller.total()

        def one(_: int) -> str:
            source, target = random.sample(range(len(arguments.banks)), 2)
            names = [f"{random.randrange(arguments.accounts):04}" for _ in range(2)]
            try:
                teller.transfer(source, names[0], target, names[1], random.randint(1, 5_000))
            except (txrpc.TxrpcError, grpc.RpcError) as error:
                return type(error).__name__
            return "committed"

        with ThreadPoolExecutor(arguments.threads) as pool:
            results = collections.Counter(pool.map(one, range(arguments.transfers)))
        after = teller.total()
        teller.close()
    print(*(f"{count} {result}" for result, count in results.most_common()), sep=", ")
    print(f"all the money: {before / 100:,.2f} before, {after / 100:,.2f} after")


if __name__ == "__main__":
    main()
