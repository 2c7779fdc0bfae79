"""The mixed load of a soak: clients of both colours that do all that applications do, and write down what they were told."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc

import txrpc
import txrpc.aio
from examples.bank import bank_pb2, bank_pb2_grpc

__all__ = ["AsyncClient", "Client", "GiveUp"]

KINDS = ("transfer",) * 6 + ("one branch", "one branch", "gives up", "too little money", "no time")
DOCUMENTED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.FAILED_PRECONDITION,  # the bank's own: not enough money
    grpc.StatusCode.UNKNOWN,  # a handler's SQLAlchemy error while its database is down
}
NOTHING_HAPPENED = (txrpc.TransactionAborted, txrpc.Unavailable)


class GiveUp(Exception):
    """The business logic changes its mind."""


class Plan:
    """One transaction to be done."""

    def __init__(self, dice: random.Random) -> None:
        self.kind = dice.choice(KINDS)
        self.timeout_s = dice.uniform(0.005, 0.05) if self.kind == "no time" else dice.uniform(2, 8)
        cents = 10_000_000 if self.kind == "too little money" else dice.randint(1, 50)
        accounts = [f"{dice.randrange(20):04}" for _ in range(2)]
        deposit = bank_pb2.Amount(account=accounts[1], cents=0 if self.kind == "one branch" else cents)
        # In one order of the banks always: see examples.bank.teller.
        self.calls: list[tuple[int, str, Any]] = [(0, "Withdraw", bank_pb2.Amount(account=accounts[0], cents=cents))]
        if self.kind == "one branch":
            self.calls = [(dice.randrange(2), "Deposit", deposit)]
        else:
            self.calls.append((1, "Deposit", deposit))
            if dice.random() < 0.5:
                self.calls = [
                    (bank, "Deposit" if verb == "Withdraw" else "Withdraw", what) for bank, verb, what in self.calls
                ]


class Diary:
    """What a client was told."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.kinds = Counter[str]()
        self.strange: list[str] = []

    def note(self, plan: Plan, xid: str, error: BaseException | None) -> None:
        """A transaction has ended for its client."""
        if error is None:
            told = "committed"
        elif isinstance(error, txrpc.OutcomeUnknown):
            told = "unknown"
        else:
            told = "aborted"
            known = isinstance(error, (*NOTHING_HAPPENED, GiveUp))
            if not known and not (isinstance(error, grpc.RpcError) and error.code() in DOCUMENTED):
                self.strange.append(f"{type(error).__name__}: {error}"[:200])
        self.kinds[f"{plan.kind}: {told}"] += 1
        if xid:
            self.told[xid] = told


class Client(threading.Thread):
    """A synchronous one."""

    def __init__(self, banks: Sequence[str], seed: int) -> None:
        super().__init__(daemon=True)
        self._banks = banks
        self._dice = random.Random(seed)
        self.over = threading.Event()
        self.diary = Diary()

    def run(self) -> None:
        channels = [
            grpc.intercept_channel(grpc.insecure_channel(bank), *txrpc.client_interceptors()) for bank in self._banks
        ]
        stubs = [bank_pb2_grpc.AccountsStub(channel) for channel in channels]
        while not self.over.wait(self._dice.uniform(0, 0.1)):
            plan, xid, failed = Plan(self._dice), "", None
            try:
                with txrpc.transaction(timeout=plan.timeout_s) as tx:
                    xid = str(tx.xid)
                    for bank, verb, amount in plan.calls:
                        getattr(stubs[bank], verb)(amount)
                    if plan.kind == "gives up":
                        raise GiveUp
            except Exception as error:
                failed = error
            self.diary.note(plan, xid, failed)
        for channel in channels:
            channel.close()


class AsyncClient(threading.Thread):
    """Several tasks on an event loop of their own."""

    def __init__(self, coordinator: str, banks: Sequence[str], seed: int, tasks: int = 3) -> None:
        super().__init__(daemon=True)
        self._coordinator, self._banks, self._seed, self._tasks = coordinator, banks, seed, tasks
        self.over = threading.Event()
        self.diary = Diary()

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        manager = await txrpc.aio.connect(self._coordinator, process="asyncio client")
        interceptors = txrpc.aio.client_interceptors()
        channels = [grpc.aio.insecure_channel(bank, interceptors=interceptors) for bank in self._banks]
        stubs: list[Any] = [bank_pb2_grpc.AccountsStub(channel) for channel in channels]
        await asyncio.gather(*[self._work(stubs, random.Random(self._seed + number)) for number in range(self._tasks)])
        for channel in channels:
            await channel.close(None)
        await manager.close()

    async def _work(self, stubs: list[Any], dice: random.Random) -> None:
        while not self.over.is_set():
            plan, xid, failed = Plan(dice), "", None
            try:
                async with txrpc.aio.transaction(timeout=plan.timeout_s) as tx:
                    xid = str(tx.xid)
                    for bank, verb, amount in plan.calls:
                        await getattr(stubs[bank], verb)(amount)
                    if plan.kind == "gives up":
                        raise GiveUp
            except Exception as error:
                failed = error
            self.diary.note(plan, xid, failed)
            await asyncio.sleep(dice.uniform(0, 0.1))
