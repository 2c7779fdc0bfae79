"""Coordinators of one process: what a takeover looks like on a stream, and what becomes of the late and the early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from tests.coordinator.test_service import HELLO, hear
from tests.waiting import aeventually
from txrpc._coordinator.config import CoordinatorConfig
from txrpc._coordinator.host import Host
from txrpc._coordinator.service import SessionService
from txrpc._decision_log.memory import MemoryHeartbeats, MemoryLog, MemoryStore
from txrpc._decision_log.port import LogError
from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.messages import GoAway, Inquiry, Takeover, Welcome
from txrpc._wire.codec import decode_coordinator_batch, encode_to_coordinator
from txrpc._wire.v1 import session_pb2_grpc
from txrpc.errors import ConfigurationError, Fenced, LogBehind
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid


class Pair:
    """Two hosts on one store, in this very process; c2 has been there longer."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.hosts: dict[str, Host] = {}

    async def start(self, node: str, beats: MemoryHeartbeats | None = None) -> Host:
        config = CoordinatorConfig(node=node)
        host = Host(config, lambda: MemoryLog(self.store), beats or MemoryHeartbeats(self.store))
        await host.start()
        self.hosts[node] = host
        return host

    def kill(self, node: str) -> None:
        """Its process is gone, and says nothing any more."""
        host = self.hosts.pop(node)
        for task in (*host._tasks, *host.home._tasks):
            task.cancel()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    await made.start("c2")
    await made.start("c1")
    yield made
    for host in made.hosts.values():
        await host.stop()


async def say(call: Any, node: str, *messages: Any) -> None:
    await call.write(encode_to_coordinator(node, list(messages)))


async def said_by(call: Any) -> list[tuple[str, Any]]:
    """What the next batch says, with the node that says it."""
    batch: Any = await call.read()
    return list(decode_coordinator_batch(batch))


async def test_a_guest_comes_is_greeted_leaves_and_what_is_late_for_it_is_no_mistake(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    host = pair.hosts["c2"]
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        session_pb2_grpc.add_CoordinatorServicer_to_server(SessionService(host, Limits()), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0.1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        stub: Any = session_pb2_grpc.CoordinatorStub(channel)
        call = stub.Session(timeout=30)
        await say(call, "", HELLO)
        assert isinstance(await hear(call), Welcome)
        pair.kill("c1")
        ((node, said),) = await said_by(call)
        assert (node, said) == ("c1", Takeover())
        await say(call, "c1", HELLO)
        ((node, welcome),) = await said_by(call)
        assert isinstance(welcome, Welcome)
        assert (node, welcome.owner.node, welcome.owner.epoch.number) == ("c1", "c1", 2)
        assert [row.holder for row, *_ in host.view() if row.node == "c1"] in (["c1"], ["c2"])
        await pair.start("c1")
        ((node, farewell),) = await said_by(call)
        assert isinstance(farewell, GoAway)
        assert (node, farewell.code) == ("c1", "fenced")
        gid = Gid(
            "default", "c1", welcome.owner.epoch, Xid(bytes(16)), BranchId(bytes(8)), ParticipantId(bytes(8)), "r"
        )
        await say(call, "c1", Inquiry(gid, 0, 0))
        await say(call, "c1", HELLO)
        await say(call, "c9", Inquiry(gid, 0, 0))  # a mistake, and the proof that the others were read
        await aeventually(lambda: "is for coordinator c9" in str([vars(record) for record in caplog.records]))
    mistakes = [record for record in caplog.records if record.getMessage() == "protocol violation"]
    assert len(mistakes) == 1


class Deaf(MemoryHeartbeats):
    """Heartbeats that fail when a test says so."""

    trouble: LogError | None = None

    def beat(self) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return super().beat()


async def test_a_node_without_a_heartbeat_is_taken_over_once_and_stays_away_until_it_has_one(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the two would take the node from each other for ever."""
    beats = Deaf(pair.store)
    await pair.hosts.pop("c1").stop()
    host = await pair.start("c1", beats)
    await aeventually(lambda: "c1" not in pair.hosts["c2"].guests)
    beats.trouble = LogError("permission denied")
    await aeventually(lambda: "c1" in pair.hosts["c2"].guests)
    guest = pair.hosts["c2"].guests["c1"].owner
    assert caplog.text.count("no heartbeat: others may take this node over") == 1
    beats.trouble = None
    await aeventually(lambda: host.home.over.done())
    assert guest.epoch == max(pair.store.nodes["c1"].epochs) == Epoch(guest.epoch)


async def taken_over(pair: Pair) -> tuple[Host, asyncio.Task[BaseException | None], asyncio.Event]:
    """c1, which another coordinator has taken over: what `until_over` will say, and how to tell it to stop."""
    host, stop = pair.hosts["c1"], asyncio.Event()
    over = asyncio.create_task(host.until_over(stop))
    held = MemoryLog(pair.store)
    held.open("c1", 7, "c2")
    return host, over, stop


async def test_a_node_that_cannot_come_back_ends_in_order_when_it_is_told_to_stop(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a member that is removed from its group: it is fenced, has closed its log, and cannot open it again."""

    def fails(*_: Any) -> Any:
        raise ConfigurationError("permission denied")

    host, over, stop = await taken_over(pair)
    monkeypatch.setattr(MemoryLog, "open", fails)
    await aeventually(lambda: "cannot come back" in caplog.text)
    stop.set()
    assert await over is None
    await host.drain()
    await host.stop()
    del pair.hosts["c1"]


async def test_a_node_that_is_fenced_while_it_comes_back_tries_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opens = MemoryLog.open

    def fenced(*_: Any) -> Any:
        raise Fenced("2.00000007 has opened the log")

    _, over, stop = await taken_over(pair)
    monkeypatch.setattr(MemoryLog, "open", fenced)
    await aeventually(lambda: "cannot come back" in caplog.text)
    monkeypatch.setattr(MemoryLog, "open", opens)
    await aeventually(lambda: "back after a takeover" in caplog.text)
    assert not over.done()
    stop.set()
    assert await over is None


def trouble_of(host: Host, node: str) -> str:
    return next((trouble for row, _, _, trouble in host.view() if row.node == node), "")


async def test_why_a_dead_node_is_not_run_is_shown_until_it_is_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log cannot be opened; or its coordinator has ended here, because the log has lost decisions."""
    opens = MemoryLog.open

    def fails(self: MemoryLog, node: str, *arguments: Any) -> Any:
        if node == "c1":
            raise ConfigurationError("permission denied")
        return opens(self, node, *arguments)

    monkeypatch.setattr(MemoryLog, "open", fails)
    pair.kill("c1")
    host = pair.hosts["c2"]
    await aeventually(lambda: trouble_of(host, "c1") == "permission denied")
    monkeypatch.setattr(MemoryLog, "open", opens)
    await aeventually(lambda: "c1" in host.guests)
    assert trouble_of(host, "c1") == ""
    host.guests["c1"].over.set_result(LogBehind("it came only to 3"))
    await aeventually(lambda: trouble_of(host, "c1") == "it came only to 3")
    await pair.start("c1")
    await aeventually(lambda: trouble_of(host, "c1") == "")
