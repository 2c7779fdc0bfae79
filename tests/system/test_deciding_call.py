"""The last call of a transaction, whose service's database decides: real PostgreSQL, a real coordinator, real gRPC."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.sql.kit import Proxy
from tests.system.test_last_resource import LONG_S, PATIENCE_S, Database, Service, insert, looks_through, said
from tests.waiting import aeventually, eventually
from txrpc.testing import failpoint
from txrpc.testing.processes import CoordinatorProcess


class Decider:
    """A service whose database decides."""

    def __init__(self, coordinator: CoordinatorProcess, database: Database, ends: ExitStack) -> None:
        engine = sa.create_engine(database.url)
        ends.callback(engine.dispose)
        self.ledger = txrpc.sql.ResourceManager("ledger", engine, decides=True)
        looked = looks_through(self.ledger)
        self.manager = ends.enter_context(
            txrpc.connect(coordinator.address, resources=[self.ledger], process="decider")
        )
        eventually(looked)
        server = grpc.server(ThreadPoolExecutor(8), interceptors=txrpc.server_interceptors(self.manager))
        self.held, self.go_on = threading.Event(), threading.Event()
        handlers = {
            "write": grpc.unary_unary_rpc_method_handler(self._write),
            "fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "set_status": grpc.unary_unary_rpc_method_handler(self._set_status),
            "nothing": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
            "hang": grpc.unary_unary_rpc_method_handler(self._hang),
            "stream": grpc.unary_stream_rpc_method_handler(self._stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.D", handlers),))
        self.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ends.callback(lambda: server.stop(0).wait(PATIENCE_S))
        ends.callback(self.go_on.set)
        plain: Any = ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{self.port}"))
        self.channel: Any = grpc.intercept_channel(plain, *txrpc.client_interceptors())

    def call(self, method: str, request: bytes = b"1", timeout: float | None = None) -> Any:
        return self.channel.unary_unary(f"/t.D/{method}")(request, timeout=timeout)

    def _write(self, request: bytes, _context: Any) -> bytes:
        insert(self.ledger, int(request))
        return b"written"

    def _fail(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        raise ValueError("no")

    def _set_status(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)
        return b""

    def _hang(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        self.held.set()
        self.go_on.wait(PATIENCE_S)
        return b"late"

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield self._write(request, context)


class Shop:
    """A service that votes, one that decides, and a client that has no database."""

    def __init__(self, coordinator: CoordinatorProcess, database: Database) -> None:
        self.ends = ExitStack()
        self.coordinator, self.database = coordinator, database
        self.a = Service(coordinator, "a", self.ends)
        self.d = Decider(coordinator, database, self.ends)
        self.client = self.ends.enter_context(txrpc.connect(coordinator.address, process="client"))
        eventually(lambda: "ledger" in self.client._client.state.registers)

    @property
    def found(self) -> tuple[list[str], list[int]]:
        """What is in the notebook, and in the ledger."""
        return self.a.notebook.lines, self.database.rows


@pytest.fixture
def shop(coordinator: CoordinatorProcess, servers: dict[str, Server]) -> Iterator[Shop]:
    shop = Shop(coordinator, Database(next(iter(servers.values()))))
    with shop.ends:
        yield shop


def test_it_commits_with_its_reply_and_the_others_follow(shop: Shop) -> None:
    with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client) as tx:
        with txrpc.final_call():
            shop.a.write(b"one")
        with txrpc.final_call(decides=True):
            shop.d.call("write")
        assert shop.database.rows == [1], "before the block has ended"
        with pytest.raises(txrpc.IllegalState, match="no work can follow"):
            shop.a.write(b"two")
    eventually(lambda: shop.found == (["one"], [1]))
    eventually(lambda: shop.database.decisions == [(True, True)])
    assert shop.client.outcome(tx.xid) is txrpc.Outcome.COMMITTED


def test_it_may_be_the_only_call(shop: Shop) -> None:
    with (
        txrpc.transaction(decide_in="ledger", wait="acknowledged", manager=shop.client),
        txrpc.final_call(decides=True),
    ):
        shop.d.call("write")
    assert shop.database.decisions == [(True, True)]
    assert shop.database.rows == [1]


@pytest.mark.parametrize("method", ["fail", "set_status", "nothing"])
def test_v7_a_call_that_fails_decides_nothing_and_the_register_says_so(shop: Shop, method: str) -> None:
    with pytest.raises((grpc.RpcError, txrpc.TransactionAborted)):
        with txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client):
            with txrpc.final_call():
                shop.a.write(b"one")
            with txrpc.final_call(decides=True):
                shop.d.call(method)
    eventually(lambda: shop.a.notebook.verbs[-1] == "rollback_prepared")
    assert shop.found == ([], [])
    assert shop.database.decisions == [(False, False)], "claimed, and not presumed"


def test_v7_a_call_whose_end_is_not_known_is_asked_for_at_the_register(shop: Shop) -> None:
    with (
        pytest.raises(grpc.RpcError) as caught,
        txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client),
    ):
        with txrpc.final_call():
            shop.a.write(b"one")
        with txrpc.final_call(decides=True):
            shop.d.call("hang", timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert shop.database.decisions == [(False, False)]
    shop.d.go_on.set()
    eventually(lambda: shop.a.notebook.verbs[-1] == "rollback_prepared")
    eventually(lambda: shop.d.manager._client.state.branches == {})
    assert shop.found == ([], []), "what came too late has met the row"


def test_rule_13_a_register_that_is_away_for_a_moment_is_asked_again(
    coordinator: CoordinatorProcess, servers: dict[str, Server]
) -> None:
    """What the last call came to is learnt when its database is back: it is not unknown at once."""
    database = Database(next(iter(servers.values())))
    target = sa.make_url(database.url)
    with Proxy(target.host or "", target.port or 5432) as proxy:
        database.url = proxy.url(database.url).render_as_string(hide_password=False)
        shop = Shop(coordinator, database)

        def come_back() -> None:
            eventually(lambda: said(shop)["received RegisterAnswer"] > 1)
            proxy.refusing = 0

        back = threading.Thread(target=come_back)
        with shop.ends:
            with pytest.raises((grpc.RpcError, txrpc.TransactionAborted)):
                with txrpc.transaction(timeout=PATIENCE_S, decide_in="ledger", manager=shop.client):
                    with txrpc.final_call():
                        shop.a.write(b"one")
                    proxy.refusing = sys.maxsize
                    proxy.cut()
                    back.start()
                    with txrpc.final_call(decides=True):
                        shop.d.call("write")
            back.join()
            eventually(lambda: shop.a.notebook.verbs[-1] == "rollback_prepared")
            assert (shop.found, database.decisions) == (([], []), [(False, False)])


def test_a_reply_that_is_lost_after_the_commit_is_no_rollback(shop: Shop) -> None:
    with (
        pytest.raises(txrpc.IllegalState, match="has committed"),
        txrpc.transaction(timeout=LONG_S, decide_in="ledger", manager=shop.client),
    ):
        with txrpc.final_call():
            shop.a.write(b"one")
        with failpoint("participant.after_decide", "sleep:2"), txrpc.final_call(decides=True):
            shop.d.call("write", timeout=1)
    eventually(lambda: shop.found == (["one"], [1]))


@pytest.mark.parametrize(
    ("decide_in", "before", "says"),
    [
        (None, None, "needs a transaction"),
        ("ledger", "call", "final_call"),
        ("ledger", "same", "must be the only one"),
        ("nowhere", None, "known are ledger"),
    ],
)
def test_what_comes_too_early_is_refused_before_it_is_sent(
    shop: Shop, decide_in: str | None, before: str | None, says: str
) -> None:
    with pytest.raises((txrpc.UsageError, txrpc.ResourceUnavailable), match=says):
        with txrpc.transaction(decide_in=decide_in, manager=shop.client):
            if before == "call":
                shop.a.write(b"one")
            elif before == "same":
                with txrpc.final_call():
                    shop.d.call("write")
            with txrpc.final_call(decides=True):
                shop.d.call("write", b"2")
    eventually(lambda: shop.d.manager._client.state.branches == {})
    assert shop.found == ([], [])


def test_a_stream_cannot_decide(shop: Shop) -> None:
    with pytest.raises(txrpc.UsageError, match="one response"):
        with txrpc.transaction(decide_in="ledger", manager=shop.client), txrpc.final_call(decides=True):
            next(shop.d.channel.unary_stream("/t.D/stream")(b"1"))
    assert shop.database.rows == []


async def test_the_same_in_asyncio(shop: Shop) -> None:
    async with await txrpc.aio.connect(shop.coordinator.address, process="aclient") as manager:
        await aeventually(lambda: "ledger" in manager._client.state.registers)
        address = f"127.0.0.1:{shop.d.port}"
        interceptors = txrpc.aio.client_interceptors()
        async with grpc.aio.insecure_channel(address, interceptors=interceptors) as opened:
            channel: Any = opened
            call = channel.unary_unary("/t.D/write")
            async with txrpc.aio.transaction(decide_in="ledger", manager=manager):
                with txrpc.aio.final_call(decides=True):
                    await call(b"1")
            stream = channel.unary_stream("/t.D/stream")
            with pytest.raises(txrpc.UsageError, match="one response"):
                async with txrpc.aio.transaction(decide_in="ledger", manager=manager):
                    with txrpc.aio.final_call(decides=True):
                        async for _ in stream(b"2"):
                            pass
    assert shop.database.rows == [1]
