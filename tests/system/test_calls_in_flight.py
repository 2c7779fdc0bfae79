"""Calls of a transaction that have not returned when it is to end, and calls that come one after the other to one branch.

A real coordinator; the service and its client are two managers in this process, over real gRPC.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

import txrpc
import txrpc.aio
from tests.runtime.memory_resource import AsyncMemoryResource, MemoryResource
from tests.waiting import aeventually, eventually
from txrpc._wire.metadata import CONTEXT_KEY, encode_context
from txrpc.testing.processes import CoordinatorProcess

PATIENCE_S = 60
LONG_S = 300
"""Longer than any test is patient: what is free before did not wait for its deadline."""


class Service:
    """Writes what it is told into a notebook; ``wait`` and the second answer of a stream wait until they may go on."""

    def __init__(self, coordinator: CoordinatorProcess) -> None:
        self.notebook, self.own = MemoryResource("there"), MemoryResource("here")
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.ends = ExitStack()
        self.manager = self.ends.enter_context(
            txrpc.connect(coordinator.address, resources=[self.notebook], process="service")
        )
        self.client = self.ends.enter_context(
            txrpc.connect(coordinator.address, resources=[self.own], process="client")
        )
        server = grpc.server(ThreadPoolExecutor(8), interceptors=txrpc.server_interceptors(self.manager))
        handlers = {
            "write": grpc.unary_unary_rpc_method_handler(self._write),
            "wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "fan": grpc.unary_unary_rpc_method_handler(self._fan),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.ends.callback(lambda: server.stop(0).wait(PATIENCE_S))
        channel = self.ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        self.plain: Any = channel
        self.left: Any = None
        self.channel: Any = grpc.intercept_channel(channel, *txrpc.client_interceptors())
        self.ends.callback(self.go_on.set)

    def method(self, name: str) -> Any:
        kind = self.channel.unary_stream if name == "stream" else self.channel.unary_unary
        return kind(f"/t.S/{name}")

    def _write(self, request: bytes, _context: Any) -> bytes:
        self.notebook.write(request.decode())
        return b"written"

    def _wait(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        self.busy.set()
        self.go_on.wait(PATIENCE_S)
        return b"written"

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"first"
        yield self._wait(request, context)

    def _fan(self, request: bytes, _context: Any) -> bytes:
        """Two calls at a time, of which one fails at once."""
        other = self.method("wait").future(request)
        assert self.busy.wait(PATIENCE_S)
        try:
            raise _NoSuchHotel
        finally:
            self.left = other  # held, or gRPC would cancel it by itself


class _NoSuchHotel(Exception):
    """What one half of a fan-out raises."""


@pytest.fixture
def service(coordinator: CoordinatorProcess) -> Iterator[Service]:
    service = Service(coordinator)
    with service.ends:
        yield service


def _future(service: Service) -> Any:
    return service.method("wait").future(b"x")


def _stream(service: Service) -> Any:
    call = service.method("stream")(b"x")
    assert next(call) == b"first"
    return call


def _thread(service: Service) -> Any:
    pool = ThreadPoolExecutor(1)
    service.ends.callback(pool.shutdown)
    return pool.submit(txrpc.carry(service.method("wait")), b"x")


@pytest.mark.parametrize("begin", [_future, _stream, _thread])
def test_rule_9_a_call_that_still_runs_rolls_everything_back(service: Service, begin: Callable[[Service], Any]) -> None:
    """Left alone it would write after the commit, or its branch would be missing from it."""
    with pytest.raises(txrpc.CallsInFlight, match="1 call of the transaction had not returned") as caught:
        with txrpc.transaction(timeout=LONG_S, manager=service.client) as tx:
            call = begin(service)
            assert service.busy.wait(PATIENCE_S)
            service.own.write("mine")
    assert str(tx.xid) in str(caught.value)
    assert tx.status is txrpc.Status.ROLLED_BACK
    assert service.notebook.rolled_back.wait(PATIENCE_S)  # while the call still runs, and holds what it has locked
    service.go_on.set()
    with suppress(Exception, grpc.FutureCancelledError):  # how the call itself ends is not what this is about
        list(call) if begin is _stream else call.result(PATIENCE_S)
    assert (service.own.lines, service.notebook.lines, service.notebook.prepared) == ([], [], {})


def test_rule_19_a_fan_out_in_a_service_frees_what_its_other_half_holds(service: Service) -> None:
    """B2: the caller was told "rolled back" at once, and the row stayed locked for the whole timeout."""
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(timeout=LONG_S, manager=service.client):
        service.method("fan")(b"x")
    assert service.notebook.rolled_back.wait(PATIENCE_S)
    assert not service.go_on.is_set()


def test_rule_19_a_call_that_comes_after_the_end_is_refused_though_it_never_had_a_branch_there(
    service: Service,
) -> None:
    """It was on its way when its transaction ended."""
    with pytest.raises(txrpc.CallsInFlight), txrpc.transaction(timeout=LONG_S, manager=service.client) as tx:
        late = tx.outgoing()
    refused = [(CONTEXT_KEY, encode_context(late.context))]
    stub = service.plain.unary_unary("/t.S/write")
    eventually(lambda: service.manager._client.state.participant.state.is_closed(tx.xid))
    with pytest.raises(grpc.RpcError) as caught:
        stub(b"late", metadata=refused)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert service.notebook.lines == []


def test_rule_9_two_calls_to_one_branch_commit(service: Service) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=service.client):
        for line in (b"one", b"two"):
            assert service.method("write")(line) == b"written"
        service.own.write("mine")
    assert (service.own.lines, service.notebook.lines) == (["mine"], ["one", "two"])
    assert service.notebook.verbs.count("begin") == 1


# ---------------------------------------------------------------------------------------------------------- asyncio


class AsyncService:
    """`Service` for asyncio."""

    def __init__(self) -> None:
        self.notebook, self.own = AsyncMemoryResource("there"), AsyncMemoryResource("here")
        there: Any = self.notebook  # whose verbs are coroutines, which no type checker sees
        here: Any = self.own
        self._resources = there, here
        self.busy, self.go_on = asyncio.Event(), asyncio.Event()
        self.server: Any = None
        self.channel: Any = None

    async def start(self, coordinator: CoordinatorProcess) -> None:
        self.manager = await txrpc.aio.connect(coordinator.address, resources=[self._resources[0]], process="service")
        self.client = await txrpc.aio.connect(coordinator.address, resources=[self._resources[1]], process="client")
        self.server = grpc.aio.server(interceptors=txrpc.aio.server_interceptors(self.manager))
        handlers = {
            "write": grpc.unary_unary_rpc_method_handler(self._write),
            "wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "fan": grpc.unary_unary_rpc_method_handler(self._fan),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=txrpc.aio.client_interceptors())

    async def stop(self) -> None:
        self.go_on.set()
        await self.channel.close()
        await self.server.stop(0)
        await self.client.close()
        await self.manager.close()

    def method(self, name: str) -> Any:
        kind = self.channel.unary_stream if name == "stream" else self.channel.unary_unary
        return kind(f"/t.S/{name}")

    async def _write(self, request: bytes, _context: Any) -> bytes:
        await self.notebook.note(request.decode())
        return b"written"

    async def _wait(self, request: bytes, context: Any) -> bytes:
        await self._write(request, context)
        self.busy.set()
        await self.go_on.wait()
        return b"written"

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self._wait(request, context)

    async def _fan(self, request: bytes, _context: Any) -> bytes:
        """Two calls at a time, of which one fails at once."""

        async def fails() -> None:
            await asyncio.wait_for(self.busy.wait(), PATIENCE_S)
            raise _NoSuchHotel

        async def waits() -> None:
            await self.method("wait")(request)

        await asyncio.gather(waits(), fails())
        return b"never"


@pytest.fixture
async def aio_service(coordinator: CoordinatorProcess) -> AsyncIterator[AsyncService]:
    service = AsyncService()
    await service.start(coordinator)
    yield service
    await service.stop()


async def _aio_call(service: AsyncService) -> Any:
    return service.method("wait")(b"x")


async def _aio_stream(service: AsyncService) -> Any:
    call = service.method("stream")(b"x")
    assert await call.read() == b"first"
    return call


async def _aio_task(service: AsyncService) -> Any:
    async def wait() -> bytes:
        answer: bytes = await service.method("wait")(b"x")
        return answer

    return asyncio.create_task(wait())


@pytest.mark.parametrize("begin", [_aio_call, _aio_stream, _aio_task])
async def test_rule_9_a_call_that_still_runs_rolls_everything_back_in_asyncio(
    aio_service: AsyncService, begin: Callable[[AsyncService], Any]
) -> None:
    service = aio_service
    with pytest.raises(txrpc.CallsInFlight, match="1 call of the transaction had not returned"):
        async with txrpc.aio.transaction(timeout=LONG_S, manager=service.client) as tx:
            call = await begin(service)
            await asyncio.wait_for(service.busy.wait(), PATIENCE_S)
            await service.own.note("mine")
    assert tx.status is txrpc.Status.ROLLED_BACK
    await aeventually(service.notebook.rolled_back.is_set)
    service.go_on.set()
    with suppress(Exception, asyncio.CancelledError):  # how the call itself ends is not what this is about
        [part async for part in call] if begin is _aio_stream else await call
    assert (service.own.lines, service.notebook.lines, service.notebook.prepared) == ([], [], {})


@pytest.mark.parametrize("where", ["root", "service"])
async def test_rule_19_a_gather_of_which_one_fails_frees_what_the_other_holds(
    aio_service: AsyncService, where: str
) -> None:
    """B2: `asyncio.gather` leaves the other one running."""
    service = aio_service

    async def fails() -> None:
        await asyncio.wait_for(service.busy.wait(), PATIENCE_S)
        raise _NoSuchHotel

    async def waits() -> None:
        await service.method("wait")(b"x")

    with pytest.raises((_NoSuchHotel, txrpc.TransactionAborted)):
        async with txrpc.aio.transaction(timeout=LONG_S, manager=service.client):
            if where == "root":
                await asyncio.gather(waits(), fails())
            else:
                await service.method("fan")(b"x")
    await aeventually(service.notebook.rolled_back.is_set)
    assert not service.go_on.is_set()


async def test_rule_9_two_calls_to_one_branch_commit_in_asyncio(aio_service: AsyncService) -> None:
    service = aio_service
    async with txrpc.aio.transaction(timeout=LONG_S, manager=service.client):
        await asyncio.gather(*(service.method("write")(line) for line in (b"one", b"two")))
        await service.own.note("mine")
    assert service.own.lines == ["mine"]
    assert sorted(service.notebook.lines) == ["one", "two"]
    assert service.notebook.verbs.count("begin") == 1
