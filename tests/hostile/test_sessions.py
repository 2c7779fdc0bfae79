"""Strangers who say anything to a real coordinator, at length and all at once, beside somebody who only wants to work."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

import txrpc
from tests.hostile.core import _Dice, _Stage
from tests.proof import note_proof
from tests.runtime.memory_resource import MemoryResource
from tests.waiting import eventually
from txrpc._protocol.messages import BranchRef, CommitRequest, Hello, OutcomeReply, ResourceInfo, Welcome
from txrpc._wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2
from txrpc.cli import overview
from txrpc.cli.reach import Reach
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, ParticipantId, Xid
from txrpc.testing.processes import CoordinatorProcess

NODE = "c1"
METHOD = "/txrpc.v1.Coordinator/Session"


class Stranger:
    """A raw session: bytes go out, bytes come in."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._going: list[bytes] = []
        self._over = threading.Event()
        self._call: Any = self._channel.stream_stream(METHOD, None, None)(self._requests(), timeout=60)

    def _requests(self) -> Iterator[bytes]:
        while not self._over.is_set():
            if self._going:
                yield self._going.pop(0)
            else:
                time.sleep(0.002)

    def say(self, *messages: Any) -> None:
        self._going.append(encode_to_coordinator(NODE, messages).SerializeToString())

    def spit(self, data: bytes) -> None:
        self._going.append(data)

    def hear(self, kind: type) -> Any:
        """The next message of *kind*; None if the session ends before."""
        try:
            for data in self._call:
                for _, message in decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(data)):
                    if isinstance(message, kind):
                        return message
        except grpc.RpcError:
            pass
        return None

    def close(self) -> None:
        self._over.set()
        self._call.cancel()
        self._channel.close()


def hello(number: int, *resources: str) -> Hello:
    named = tuple(ResourceInfo(name, "test") for name in resources)
    return Hello(1, "default", ParticipantId(number.to_bytes(8, "big")), "stranger", named)


class Bystander:
    """A process with two branches a transaction through the coordinator, again and again; every answer must be right."""

    def __init__(self, address: str) -> None:
        self.books = (MemoryResource("one"), MemoryResource("two"))
        self.manager = txrpc.connect(address, resources=self.books, process="bystander")
        self.told: dict[str, bool] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        number = 0
        while not self._over.wait(0.01):
            number += 1
            line = f"line {number}"
            try:
                with txrpc.transaction(timeout=10):
                    for book in self.books:
                        book.write(line)
                    if number % 5 == 0:
                        raise ZeroDivisionError
                self.told[line] = True
            except ZeroDivisionError:
                self.told[line] = False

    def close(self) -> None:
        """End, and check."""
        self._over.set()
        self._thread.join(30)
        self.manager.close()
        for book in self.books:
            assert sorted(book.lines) == sorted(line for line, committed in self.told.items() if committed)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path, options=["--max-sessions", "1200"]) as process:
        yield process
        assert "Traceback" not in process.text()
        assert process.running


@pytest.fixture
def bystander(coordinator: CoordinatorProcess) -> Iterator[Bystander]:
    made = Bystander(coordinator.address)
    yield made
    eventually(lambda: len(made.told) > 20, 20)  # whatever happened, it can still work
    made.close()


def memory_mb(process: CoordinatorProcess) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 1e6


def abuse(address: str, dice: random.Random) -> int:
    """One session's worth of nonsense; returns how many messages that was."""
    stranger = Stranger(address)
    said = 0
    try:
        if dice.random() < 0.9:
            stranger.say(hello(dice.randrange(3), *dice.choice(([], ["one"], ["nobody"]))))
        for _ in range(dice.randint(1, 40)):
            choice = dice.random()
            if choice < 0.05:
                stranger.spit(dice.randbytes(dice.randint(0, 200)))
            elif choice < 0.1:
                stranger.say(hello(dice.randrange(3)))
            else:
                stage = _Stage(_Dice(dice.randbytes(30)))
                stranger.say(*[stage._message() for _ in range(dice.randint(1, 20))])
            said += 1
        if dice.random() < 0.5:
            time.sleep(0.02)
    finally:
        stranger.close()
    return said


@pytest.mark.proof
def test_rule_15_strangers_who_say_anything_hurt_nobody(coordinator: CoordinatorProcess, bystander: Bystander) -> None:
    until, said = time.monotonic() + 15, [0, 0, 0]
    warm: list[float] = []

    def go_on(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            said[number] += abuse(coordinator.address, dice)

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(5)
    warm.append(memory_mb(coordinator))
    for thread in threads:
        thread.join(60)
    assert memory_mb(coordinator) < warm[0] + 60
    assert bystander.told
    note_proof("fuzz", target="sessions", examples=sum(said), seconds=15)


def test_rule_15_who_knows_a_transactions_names_still_cannot_end_it(
    coordinator: CoordinatorProcess, bystander: Bystander
) -> None:
    """Forged votes, acknowledgements and rollbacks of a transaction that is being decided, from a session that is not its."""
    liar = Stranger(coordinator.address)
    liar.say(hello(77, "three"))
    assert isinstance(liar.hear(Welcome), Welcome)
    for number in range(200):
        with txrpc.transaction(timeout=10) as tx:
            for book in bystander.books:
                book.write(f"forged {number}")
            bystander.told[f"forged {number}"] = True
            stage = _Stage(_Dice(random.Random(number).randbytes(40)))
            messages = [stage._message() for _ in range(8)]
            liar.say(*[_about(message, tx.xid) for message in messages if type(message).__name__ != "RollbackRequest"])
        assert tx.status is txrpc.Status.COMMITTED
    liar.close()


def _about(message: Any, xid: Xid) -> Any:
    if hasattr(message, "gid"):
        return dataclasses.replace(message, gid=dataclasses.replace(message.gid, xid=xid))
    return dataclasses.replace(message, xid=xid)


async def test_a_thousand_sessions_at_once(coordinator: CoordinatorProcess, bystander: Bystander) -> None:
    """All are welcomed, and the bystander goes on."""
    channels: list[Any] = [grpc.aio.insecure_channel(coordinator.address) for _ in range(20)]

    async def session(number: int) -> Any:
        call = channels[number % len(channels)].stream_stream(METHOD, None, None)()
        await call.write(encode_to_coordinator(NODE, [hello(10_000 + number)]).SerializeToString())
        ((_, welcome),) = decode_coordinator_batch(session_pb2.CoordinatorBatch.FromString(await call.read()))
        assert isinstance(welcome, Welcome)
        return call

    async with asyncio.timeout(60):
        calls = await asyncio.gather(*[session(number) for number in range(1_000)])
    assert len(overview.as_dict(overview.ask(Reach(coordinator.address), 10, 10))["sessions"]) >= 1_001
    before = len(bystander.told)
    async with asyncio.timeout(30):
        while len(bystander.told) < before + 10:
            await asyncio.sleep(0.05)
    for call in calls:
        call.cancel()
    for channel in channels:
        await channel.close()
    note_proof("fuzz", target="sessions at once", examples=1_000, seconds=0)


def test_ten_thousand_branches_are_refused_in_one_sentence(
    coordinator: CoordinatorProcess, bystander: Bystander
) -> None:
    client = Stranger(coordinator.address)
    client.say(hello(88))
    welcome = client.hear(Welcome)
    refs = tuple(
        BranchRef(BranchId(number.to_bytes(8, "big")), "one", ParticipantId(bytes(8)), 1) for number in range(10_000)
    )
    xid = Xid.make(int(time.time() * 1000), bytes(10))
    client.say(CommitRequest(xid, welcome.owner.epoch, welcome.tick, refs, 5_000))
    reply = client.hear(OutcomeReply)
    assert reply.outcome is txrpc.Outcome.ABORTED
    assert reply.reason == Reason(AbortCode.LIMIT_EXCEEDED, reply.reason.text)
    assert "10000 branches" in reply.reason.text.replace(",", "")
    client.close()


SLOW: dict[str, Callable[[socket.socket], None]] = {
    "connects and says nothing": lambda line: None,
    "one byte of HTTP/2's first line at a time": lambda line: _drip(line, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "TLS to a port without": lambda line: line.sendall(bytes.fromhex("16030100c8010000c40303") + bytes(150)),
    "HTTP/1.1": lambda line: line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a frame that never ends": lambda line: line.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000") + bytes.fromhex("ffffff00")
    ),
}


def _drip(line: socket.socket, data: bytes) -> None:
    for byte in data[:12]:
        line.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.proof
@pytest.mark.parametrize("way", SLOW)
def test_two_hundred_peers_that_are_slow_or_speak_another_language(
    coordinator: CoordinatorProcess, bystander: Bystander, way: str
) -> None:
    host, _, port = coordinator.address.partition(":")
    before = len(bystander.told)
    lines = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
    threads = [threading.Thread(target=_politely, args=(way, line)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    time.sleep(0.5)
    assert len(bystander.told) > before, "the bystander goes on"
    for line in lines:
        line.close()


def _politely(way: str, line: socket.socket) -> None:
    with suppress(OSError):  # it may be shown the door
        SLOW[way](line)
