"""The session service in this process, with the real engine: peers that send nonsense, nothing, or never read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from tests.versions import needs_grpc
from txrpc._coordinator import service
from txrpc._coordinator.config import CoordinatorConfig
from txrpc._coordinator.driver import CoordinatorDriver
from txrpc._coordinator.host import Host
from txrpc._coordinator.service import SessionService
from txrpc._decision_log.memory import MemoryLog
from txrpc._decision_log.port import Decision
from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.messages import GoAway, Hello, OutcomeReply, OutcomeRequest, Tick, ToCoordinator, Welcome
from txrpc._wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2, session_pb2_grpc
from txrpc.ids import Epoch, ParticipantId, Xid

HELLO = Hello(1, "default", ParticipantId(b"process."), "test")


class SlowLog(MemoryLog):
    """A memory log whose answers can be held back."""

    gate: threading.Event | None = None
    asked = 0

    def outcome(self, xid: Xid) -> Decision | None:
        self.asked += 1
        if self.gate is not None:
            self.gate.wait(10)
        return super().outcome(xid)


@dataclass
class House:
    log: SlowLog
    driver: CoordinatorDriver
    sessions: SessionService
    server: Any
    channel: Any

    def call(self) -> Any:
        return session_pb2_grpc.CoordinatorStub(self.channel).Session(timeout=30)

    def raw(self) -> Any:
        return self.channel.stream_stream("/txrpc.v1.Coordinator/Session", None, None)(timeout=30)

    async def until(self, what: Any, timeout_s: float = 10) -> None:
        async with asyncio.timeout(timeout_s):
            while not what():
                await asyncio.sleep(0.01)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    log = SlowLog()
    host = Host(CoordinatorConfig(), lambda: log, None)
    await host.start()
    sessions = SessionService(host, Limits())
    server = grpc.aio.server()
    session_pb2_grpc.add_CoordinatorServicer_to_server(sessions, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield House(log, host.home, sessions, server, channel)
    await server.stop(0.1)
    await host.stop()


async def say(call: Any, *messages: ToCoordinator) -> None:
    await call.write(encode_to_coordinator("c1", list(messages)))


async def listen(call: Any) -> AsyncIterator[Any]:
    """Its messages, other than ticks."""
    while (batch := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        if isinstance(batch, bytes):
            batch = session_pb2.CoordinatorBatch.FromString(batch)
        for _, message in decode_coordinator_batch(batch):
            if not isinstance(message, Tick):
                yield message


async def hear(call: Any) -> Any:
    """The next message, if it came alone; None at the end."""
    return await anext(listen(call), None)


@pytest.mark.parametrize("greeted", [False, True])
async def test_rule_15_bytes_that_are_no_protobuf_are_the_senders_mistake(
    house: House, caplog: pytest.LogCaptureFixture, greeted: bool
) -> None:
    call = house.raw()
    if greeted:
        await call.write(encode_to_coordinator("c1", [HELLO]).SerializeToString())
        assert isinstance(await hear(call), Welcome)
    await call.write(b"\xff\xff\xff\xff")
    farewell = await hear(call)
    assert isinstance(farewell, GoAway)
    assert (farewell.code, farewell.text) == ("protocol", "what was sent is no batch of messages")
    assert await hear(call) is None
    await house.until(lambda: house.sessions.peers == {})
    assert len(house.driver.core.state.directory) == 0
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_rule_15_a_violation_of_the_protocol_is_logged_and_ends_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """The line's own fields must not break the line: it would end the session, and be told as a mistake of the coordinator."""
    call = house.call()
    await say(call, HELLO, replace(HELLO, participant=ParticipantId(b"somebody")))
    assert isinstance(await hear(call), Welcome)
    await house.until(lambda: "protocol violation" in caplog.text)
    (line,) = [record for record in caplog.records if record.getMessage() == "protocol violation"]
    assert vars(line)["message_name"] == "Hello"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_batches_are_counted_beside_the_messages_in_them(house: House) -> None:
    call = house.call()
    questions = [OutcomeRequest(Xid.make(number, bytes(10)), house.driver.owner.epoch, 0) for number in range(20)]
    await say(call, HELLO, *questions)
    await house.until(lambda: house.driver.messages["sent OutcomeReply"] == len(questions))
    assert house.sessions.batches["received"] == 1
    assert 1 <= house.sessions.batches["sent"] <= house.driver.messages.total()


async def test_who_says_nothing_is_sent_away(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_HELLO_S", 0.1)
    farewell = await hear(house.call())
    assert isinstance(farewell, GoAway)
    assert "no Hello within" in farewell.text


async def test_who_never_reads_is_let_go_and_others_are_not_hurt(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_OUTBOX_MAX", 100)
    monkeypatch.setattr(service, "_FAREWELL_S", 0.2)
    slow = house.call()
    await say(slow, HELLO)
    await house.until(lambda: len(house.driver.core.state.directory) == 1)
    box: Any = next(iter(house.driver._outboxes.values()))
    with pytest.raises(TimeoutError):  # until gRPC takes no more: what fits into its windows is written, not waiting
        for _ in range(5_000):
            for _ in range(50):
                box.put(GoAway("noise", "x" * 400, retry=True))
            await house.until(lambda: not box._stream.mailbox._queue, timeout_s=0.5)
    for _ in range(service._OUTBOX_MAX):
        box.put(GoAway("noise", "x" * 400, retry=True))
    await house.until(lambda: house.driver.core.state.directory.sessions == {})
    assert "session did not read" in caplog.text
    good = house.call()
    await say(good, HELLO)
    assert isinstance(await hear(good), Welcome)
    with pytest.raises(grpc.RpcError) as caught:  # what had been written comes first, then why it ended
        while True:
            assert await hear(slow) is not None
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await house.until(lambda: len(house.sessions.peers) == 1)


async def test_a_session_that_never_reads_does_not_keep_the_server_from_stopping(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_FAREWELL_S", 0.1)
    slow = house.call()
    await say(slow, HELLO)
    await house.until(lambda: len(house.driver.core.state.directory) == 1)
    for _ in range(20_000):
        next(iter(house.driver._outboxes.values())).put(GoAway("noise", "x" * 400, retry=True))
    await house.driver.drain(1)
    async with asyncio.timeout(10):
        await house.server.stop(0.2)


async def test_a_flood_of_questions_is_held_back_and_all_are_answered(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_QUESTIONS_MAX", 20)
    house.log.gate = threading.Event()
    call = house.call()
    await say(call, HELLO)
    welcome = await hear(call)
    assert isinstance(welcome, Welcome)
    strange = Epoch.make(welcome.owner.epoch.number, 7)
    for start in range(0, 100, 10):
        questions = [OutcomeRequest(Xid.make(n + 1, bytes(10)), strange, 0) for n in range(start, start + 10)]
        await say(call, *questions)
    await house.until(lambda: house.driver.book.questions.total() > 20)
    await asyncio.sleep(0.3)  # more would come if more were read
    assert house.driver.book.questions.total() in range(21, 31)
    house.log.gate.set()
    answers: set[Xid] = set()
    async for message in listen(call):
        assert isinstance(message, OutcomeReply)
        answers.add(message.xid)
        if len(answers) == 100:
            break
    await house.until(lambda: not house.driver.book.questions)


async def test_questions_of_a_session_that_has_ended_are_not_asked(house: House) -> None:
    house.log.gate = threading.Event()
    call = house.call()
    strange = Epoch.make(house.driver.owner.epoch.number, 7)
    await say(call, HELLO, *[OutcomeRequest(Xid.make(n + 1, bytes(10)), strange, 0) for n in range(500)])
    await house.until(lambda: house.log.asked == 1)
    call.cancel()
    await house.until(lambda: not house.sessions.peers)
    house.log.gate.set()
    await house.until(lambda: not house.driver.book.questions)
    assert house.log.asked <= 50
    other = house.call()
    await say(other, HELLO)
    assert isinstance(await hear(other), Welcome)
    await say(other, OutcomeRequest(Xid.make(9, bytes(10)), strange, 0))
    assert isinstance(await hear(other), OutcomeReply)


@needs_grpc(83, "a write to a peer that has vanished without reading never ends")
async def test_who_never_reads_may_vanish_without_a_trace(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_FAREWELL_S", 0.1)
    slow = house.call()
    await say(slow, HELLO)
    await house.until(lambda: len(house.driver.core.state.directory) == 1)
    for _ in range(20_000):
        next(iter(house.driver._outboxes.values())).put(GoAway("noise", "x" * 400, retry=True))
    next(iter(house.driver._outboxes.values())).close(GoAway("slow", "", retry=True))
    await house.until(lambda: not house.sessions.peers)
    await house.channel.close()
    await house.until(lambda: house.sessions.open == 0)
    await asyncio.sleep(0.1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
