"""Rule 19: what takes no part is an error where it could be forgotten, and allowed where the caller says so (M1, F13, F14)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from txrpc.testing.processes import CoordinatorProcess


class Shop:
    """A service over a database, whose methods write what they are called with, each in its own way."""

    def __init__(self, address: str, server: Server, ends: ExitStack) -> None:
        self.server, self.ends = server, ends
        url = server.create_database("half")
        ends.callback(server.execute, "DROP DATABASE half WITH (FORCE)")
        server.execute("CREATE TABLE entry (name text)", "half")
        self.engine = sa.create_engine(url)
        ends.callback(self.engine.dispose)
        self.bank = txrpc.sql.ResourceManager("bank", self.engine)
        self.manager = ends.enter_context(txrpc.connect(address, resources=[self.bank], process="service"))
        self.client = ends.enter_context(txrpc.connect(address, process="client"))

    def put(self, name: str) -> None:
        with self.bank.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES (:name)"), {"name": name})

    def names(self) -> list[str]:
        return [name for (name,) in self.server.execute("SELECT name FROM entry", "half")]

    def serve(self, method: Callable[[bytes, Any], bytes], *, joins: bool = True, outside: Any = ()) -> Any:
        """The method, as its clients see it; without *joins* the server was built without interceptors."""
        interceptors = txrpc.server_interceptors(self.manager) if joins else []
        server = grpc.server(ThreadPoolExecutor(4), interceptors=interceptors)
        handlers = {"Put": grpc.unary_unary_rpc_method_handler(method)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.ends.callback(lambda: server.stop(0).wait())
        channel = self.ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        intercepted: Any = grpc.intercept_channel(channel, *txrpc.client_interceptors(outside))
        return intercepted.unary_unary("/t.S/Put")


@pytest.fixture
def shop(servers: dict[str, Server], tmp_path: Path) -> Iterator[Shop]:
    with ExitStack() as ends:
        coordinator = ends.enter_context(CoordinatorProcess(tmp_path))
        yield Shop(coordinator.address, servers["bank-a"], ends)


def test_a_decorated_method_of_a_server_without_interceptors_writes_nothing(shop: Shop) -> None:
    @txrpc.transactional
    def put(request: bytes, context: grpc.ServicerContext) -> bytes:
        shop.put("half")
        return b""

    call = shop.serve(put, joins=False)
    with pytest.raises(grpc.RpcError) as caught, txrpc.transaction(manager=shop.client):
        call(b"")
    assert "built without txrpc's interceptors: grpc.server(..., interceptors=txrpc.server_interceptors())" in str(
        caught.value
    )
    assert shop.names() == []


def test_a_decorated_method_that_is_called_without_a_transaction_begins_its_own(shop: Shop) -> None:
    @txrpc.transactional(manager=shop.manager)
    def put(request: bytes, context: grpc.ServicerContext) -> bytes:
        shop.put("whole")
        return b""

    assert shop.serve(put, joins=False)(b"") == b""
    assert shop.names() == ["whole"]


def test_a_server_that_takes_no_part_is_an_error_and_rolls_back(shop: Shop) -> None:
    """M1: what it did stays, as the error says; what takes part is undone, where a half was committed without a word."""
    mail = shop.serve(lambda _request, _context: b"sent", joins=False)
    with pytest.raises(txrpc.NotJoined, match=r"/t\.S/Put: the server that answered takes no part") as caught:
        with txrpc.transaction(manager=shop.client) as tx:
            mail(b"")
    assert "outside=['/t.S/Put']" in str(caught.value)
    assert tx.status is txrpc.Status.ROLLED_BACK
    assert tx.doom is not None
    assert not tx.doom.retryable


@pytest.mark.parametrize("where", ["method", "caller"])
def test_b8_a_method_that_promises_to_only_read_cannot_write_for_a_caller_that_may(shop: Shop, where: str) -> None:
    """The promise was ignored when the method joined a transaction; the caller's block hands its own on."""

    @txrpc.transactional(read_only=where == "method")
    def put(request: bytes, context: grpc.ServicerContext) -> bytes:
        shop.put(request.decode())
        return b""

    call = shop.serve(put)
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(manager=shop.client):
        with pytest.raises(grpc.RpcError, match="read-only transaction"):
            with txrpc.transaction(read_only=where == "caller"):
                call(b"half")
    assert shop.names() == []


def test_b8_a_caller_writes_before_and_behind_a_call_that_only_reads(shop: Shop) -> None:
    def put(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"read":
            with shop.bank.connection() as connection:
                return b",".join(name.encode() for name in connection.scalars(sa.text("SELECT name FROM entry")))
        shop.put(request.decode())
        return b""

    call = shop.serve(put)
    with txrpc.transaction(manager=shop.client):
        with txrpc.transaction(read_only=True):
            assert call(b"read") == b""
        call(b"a")
        with txrpc.transaction(read_only=True):
            assert call(b"read") == b"a"
        call(b"b")
    assert shop.names() == ["a", "b"]


def test_a_call_that_is_meant_to_be_outside_is_allowed_by_name_and_by_block(shop: Shop) -> None:
    named = shop.serve(lambda _request, _context: b"sent", joins=False, outside=["/t.S/*"])
    plain = shop.serve(lambda _request, _context: b"sent", joins=False)
    with txrpc.transaction(manager=shop.client) as tx:
        assert named(b"") == b"sent"
        with txrpc.transaction(propagation="not_supported"):
            assert plain(b"") == b"sent"
    assert tx.status is txrpc.Status.COMMITTED


def test_a_thread_of_a_service_without_the_transaction_writes_nothing(shop: Shop) -> None:
    """F14: it committed by itself, and stayed when the caller rolled back."""
    errors: list[BaseException] = []

    def put(request: bytes, _context: Any) -> bytes:
        def helper() -> None:
            try:
                shop.put("stray")
            except txrpc.NoTransaction as error:
                errors.append(error)

        thread = threading.Thread(target=helper)
        thread.start()
        thread.join()
        carried = threading.Thread(target=txrpc.carry(shop.put), args=["carried"])
        carried.start()
        carried.join()
        return b""

    call = shop.serve(put)
    with txrpc.transaction(manager=shop.client):
        call(b"")
    assert shop.names() == ["carried"]
    (error,) = errors
    assert "txrpc.carry" in str(error)
    assert "outside='local'" in str(error)


@pytest.mark.parametrize(("outside", "served", "allowed"), [
    (None, False, True), (None, True, False), ("local", True, True), ("refuse", False, False),
])  # fmt: skip
def test_what_a_resource_does_outside_a_transaction(shop: Shop, outside: Any, served: bool, allowed: bool) -> None:
    """Both `session` and `connection`; it depends on whether this process serves, unless it was said."""
    resource = txrpc.sql.ResourceManager("bank", shop.engine, outside=outside)
    resource.user = shop.manager._client.state
    shop.manager._client.state.serves = served
    for block in (resource.session, resource.connection):
        if allowed:
            with block() as used:
                used.execute(sa.text("INSERT INTO entry VALUES ('local')"))
        else:
            with pytest.raises(txrpc.NoTransaction, match="'bank' is used outside a transaction"), block():
                pass
    assert shop.names() == ["local"] * (2 * allowed)
    resource.close()


def test_another_word_for_outside_is_refused(shop: Shop) -> None:
    word: Any = "somewhere"
    with pytest.raises(txrpc.ConfigurationError, match="outside is 'local' or 'refuse', not 'somewhere'"):
        txrpc.sql.ResourceManager("bank", shop.engine, outside=word)


async def test_a_decorated_coroutine_of_a_server_without_interceptors_writes_nothing(
    shop: Shop, tmp_path: Path
) -> None:
    @txrpc.aio.transactional
    async def put(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        shop.put("half")
        return b""

    server = grpc.aio.server()
    handlers = {"Put": grpc.unary_unary_rpc_method_handler(put)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    session: Any = shop.client._client._sessions[0]
    client = await txrpc.aio.connect(session.address, process="aio")
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", interceptors=txrpc.aio.client_interceptors()
        ) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                async with txrpc.aio.transaction(manager=client):
                    await channel.unary_unary("/t.S/Put", None, None)(b"")
        assert "NotJoined" in str(caught.value)
        assert shop.names() == []
    finally:
        await client.close()
        await server.stop(0)


def test_interceptors_that_are_given_twice_count_once(shop: Shop) -> None:
    """B9: every commit failed, because two calls had been counted where the service saw one."""
    twice = [*txrpc.server_interceptors(shop.manager), *txrpc.server_interceptors(shop.manager)]
    server = grpc.server(ThreadPoolExecutor(4), interceptors=twice)

    def put(request: bytes, _context: object) -> bytes:
        shop.put(request.decode())
        return b""

    def put_all(request: bytes, _context: object) -> Iterator[bytes]:
        for name in request.decode():
            shop.put(name)
            yield b""

    handlers = {
        "Put": grpc.unary_unary_rpc_method_handler(put),
        "PutAll": grpc.unary_stream_rpc_method_handler(put_all),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    shop.ends.callback(lambda: server.stop(0).wait())
    channel = shop.ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
    doubled: Any = grpc.intercept_channel(channel, *txrpc.client_interceptors(), *txrpc.client_interceptors())
    with shop.client.transaction():
        doubled.unary_unary("/t.S/Put")(b"a")
        assert len(list(doubled.unary_stream("/t.S/PutAll")(b"bc"))) == 2
    assert shop.names() == ["a", "b", "c"]


async def test_interceptors_that_are_given_twice_count_once_in_asyncio(shop: Shop) -> None:
    """B9, as above; the service is a synchronous one in an asyncio server."""
    session: Any = shop.client._client._sessions[0]
    address = session.address
    async with await txrpc.aio.connect(address, process="aio client") as client:
        twice = [*txrpc.aio.server_interceptors(), *txrpc.aio.server_interceptors()]
        server = grpc.aio.server(interceptors=twice)
        seen: list[Any] = []

        async def get(_request: bytes, _context: object) -> bytes:
            seen.append(txrpc.aio.current_transaction())
            return b"here"

        async def get_all(_request: bytes, _context: object) -> Any:
            for _ in range(2):
                seen.append(txrpc.aio.current_transaction())
                yield b"here"

        handlers = {
            "Get": grpc.unary_unary_rpc_method_handler(get),
            "GetAll": grpc.unary_stream_rpc_method_handler(get_all),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        doubled = [*txrpc.aio.client_interceptors(), *txrpc.aio.client_interceptors()]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=doubled) as channel:
            stub: Any = channel
            async with client.transaction() as tx:
                assert await stub.unary_unary("/t.S/Get")(b"") == b"here"
                assert [answer async for answer in stub.unary_stream("/t.S/GetAll")(b"")] == [b"here", b"here"]
        assert [each.xid for each in seen] == [tx.xid] * 3
        assert tx.status is txrpc.Status.COMMITTED
        await server.stop(0)
