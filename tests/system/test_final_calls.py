"""Calls that are a transaction's last ones to their service: the branches vote before the reply, and the vote travels with it.

A real coordinator; two services and their client are managers in this process, over real gRPC.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest

import txrpc
import txrpc.aio
from tests.runtime.memory_resource import AsyncMemoryResource, MemoryResource
from tests.waiting import eventually
from txrpc._wire.metadata import CONTEXT_KEY, encode_context
from txrpc.errors import AbortCode
from txrpc.resource import Outcome
from txrpc.testing import failpoint
from txrpc.testing.processes import CoordinatorProcess

LONG_S = 300
"""Longer than any test is patient: what is free before did not wait for its deadline."""
PATIENCE_S = 60


class Service:
    """Writes what it is told; ``further`` hands it on to another service, ``only`` declares itself the last call."""

    def __init__(self, coordinator: CoordinatorProcess, name: str, ends: ExitStack) -> None:
        self.notebook = MemoryResource(name)
        self.when_replied: list[str] = []
        self.further: Any = None
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.manager = ends.enter_context(txrpc.connect(coordinator.address, resources=[self.notebook], process=name))
        server = grpc.server(ThreadPoolExecutor(8), interceptors=txrpc.server_interceptors(self.manager))
        only = txrpc.transactional(final=True, manager=self.manager)(self._write)
        handlers = {
            "write": grpc.unary_unary_rpc_method_handler(self._write),
            "only": grpc.unary_unary_rpc_method_handler(lambda request, context: only(request, context)),
            "wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "hand_on": grpc.unary_unary_rpc_method_handler(self._hand_on),
            "read": grpc.unary_unary_rpc_method_handler(lambda request, context: self._write(b"", context)),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ends.callback(lambda: server.stop(0).wait(PATIENCE_S))
        self.plain: Any = ends.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        self.channel: Any = grpc.intercept_channel(self.plain, *txrpc.client_interceptors())

    def call(self, method: str, line: str) -> Any:
        return self.channel.unary_unary(f"/t.S/{method}")(line.encode())

    def _write(self, request: bytes, _context: Any) -> bytes:
        handle: Any = txrpc.current_transaction()
        with handle.use(self.notebook) as page:
            if request:
                page.write(request.decode())
        return b"written"

    def _fail(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        raise ValueError("no")

    def _wait(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        self.busy.set()
        self.go_on.wait(PATIENCE_S)
        return b"written"

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        for number in range(3):
            self._write(request + b"%d" % number, context)
            yield b"written"
            self.go_on.wait(PATIENCE_S)

    def _hand_on(self, request: bytes, context: Any) -> bytes:
        self._write(request, context)
        with txrpc.final_call():
            self.further.call("write", "handed on")
        return b"written"


class Bank:
    """Two services and a client."""

    def __init__(self, coordinator: CoordinatorProcess) -> None:
        self.ends = ExitStack()
        self.a, self.b = (Service(coordinator, name, self.ends) for name in ("a", "b"))
        self.a.further = self.b
        self.client = self.ends.enter_context(txrpc.connect(coordinator.address, process="client"))
        for service in (self.a, self.b):
            self.ends.callback(service.go_on.set)


@pytest.fixture
def bank(coordinator: CoordinatorProcess) -> Iterator[Bank]:
    bank = Bank(coordinator)
    with bank.ends:
        yield bank


def test_final_calls_vote_before_their_reply_and_commit(bank: Bank) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=bank.client), txrpc.final_call():
        bank.a.call("write", "one")
        assert bank.a.notebook.verbs == ["begin", "prepare"], "before the reply, in the handler's own thread"
        bank.b.call("write", "two")
    assert (bank.a.notebook.lines, bank.b.notebook.lines) == (["one"], ["two"])
    assert bank.a.notebook.verbs == bank.b.notebook.verbs == ["begin", "prepare", "commit_prepared"]


def test_a_method_may_say_that_it_is_called_once(bank: Bank) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=bank.client):
        bank.a.call("only", "one")
        assert bank.a.notebook.verbs == ["begin", "prepare"]
        bank.b.call("write", "two")
    assert (bank.a.notebook.lines, bank.b.notebook.lines) == (["one"], ["two"])


def test_earlier_calls_count_and_a_stream_votes_after_its_last_message(bank: Bank) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=bank.client):
        bank.a.call("write", "before")
        with txrpc.final_call():
            stream = bank.a.channel.unary_stream("/t.S/stream")(b"x")
            assert next(stream) == b"written"
            assert bank.a.notebook.verbs == ["begin"]
            bank.a.go_on.set()
            assert len(list(stream)) == 2
        bank.b.call("write", "two")
    assert bank.a.notebook.lines == ["before", "x0", "x1", "x2"]


def test_a_service_may_say_so_of_the_calls_that_it_makes(bank: Bank) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=bank.client):
        bank.a.call("hand_on", "one")
        assert bank.b.notebook.verbs == ["begin", "prepare"]
        assert bank.a.notebook.verbs == ["begin"], "its own caller has not said so"
    assert (bank.a.notebook.lines, bank.b.notebook.lines) == (["one"], ["handed on"])


def test_what_wrote_nothing_votes_read_only_and_is_finished(bank: Bank) -> None:
    with txrpc.transaction(timeout=LONG_S, manager=bank.client), txrpc.final_call():
        bank.a.call("read", "")
        bank.b.call("write", "two")
    assert bank.a.notebook.verbs == ["begin", "prepare"]
    assert bank.b.notebook.lines == ["two"]


def test_a_rollback_reaches_what_has_voted_at_once(bank: Bank) -> None:
    with pytest.raises(ValueError, match="no"), txrpc.transaction(timeout=LONG_S, manager=bank.client):
        with txrpc.final_call():
            bank.a.call("write", "one")
        raise ValueError("no")
    eventually(lambda: bank.a.notebook.verbs == ["begin", "prepare", "rollback_prepared"])
    assert bank.a.notebook.lines == []


# ------------------------------------------------------------------------------------------------------- bad input


def test_rule_10_a_call_after_the_final_one_is_refused_and_everything_rolls_back(bank: Bank) -> None:
    with pytest.raises(txrpc.TransactionAborted, match="after the transaction's final call to this service"):
        with txrpc.transaction(timeout=LONG_S, manager=bank.client):
            with txrpc.final_call():
                bank.a.call("write", "one")
            bank.a.call("write", "again")
    eventually(lambda: "rollback_prepared" in bank.a.notebook.verbs)
    assert bank.a.notebook.lines == []


def test_rule_9_an_early_vote_that_counted_a_call_more_than_its_root_aborts(bank: Bank) -> None:
    """A call ran twice: what is prepared is not what the root has asked for."""
    with pytest.raises(txrpc.TransactionAborted, match="had completed 2 calls when it voted, the root saw 1") as caught:
        with txrpc.transaction(timeout=LONG_S, manager=bank.client) as tx:
            call = tx.outgoing()
            replayed = [(CONTEXT_KEY, encode_context(call.context))]
            call.replied(None)
            bank.a.plain.unary_unary("/t.S/write")(b"twice", metadata=replayed)
            with txrpc.final_call():
                bank.a.call("write", "one")
            bank.b.call("write", "two")
    assert caught.value.reason.code is AbortCode.CALLS_DIFFER
    eventually(lambda: "rollback_prepared" in bank.a.notebook.verbs)
    assert (bank.a.notebook.lines, bank.b.notebook.lines) == ([], [])


def test_rule_9_a_call_that_is_running_when_the_final_one_ends_makes_the_vote_abort(bank: Bank) -> None:
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(timeout=LONG_S, manager=bank.client):
        running = bank.a.channel.unary_unary("/t.S/wait").future(b"one")
        assert bank.a.busy.wait(PATIENCE_S)
        with txrpc.final_call():
            bank.a.call("write", "two")
        bank.a.go_on.set()
        running.result(PATIENCE_S)
    eventually(lambda: "rollback" in bank.a.notebook.verbs)
    assert "prepare" not in bank.a.notebook.verbs
    assert bank.a.notebook.lines == []


def test_rule_19_a_vote_whose_reply_was_lost_is_undone_before_its_deadline(bank: Bank) -> None:
    """Its root does not know of the branch, so every process is told."""
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(timeout=LONG_S, manager=bank.client) as tx:
        call = tx.outgoing()
        call.context = replace(call.context, final=True)
        bank.a.plain.unary_unary("/t.S/write")(b"one", metadata=[(CONTEXT_KEY, encode_context(call.context))])
        call.lost(txrpc.Reason(AbortCode.CALL_END_UNKNOWN, "the reply was lost"))
    eventually(lambda: bank.a.notebook.verbs == ["begin", "prepare", "rollback_prepared"])


def test_rule_5_an_early_vote_whose_root_is_gone_is_presumed_aborted_at_its_deadline(
    coordinator: CoordinatorProcess, bank: Bank
) -> None:
    def begin_and_leave() -> txrpc.Xid:
        with txrpc.connect(
            coordinator.address, process="root"
        ) as root:  # which ends, and says nothing about its transaction
            xid = root.begin(timeout=2).xid
            with txrpc.final_call():
                bank.a.call("write", "one")
            assert bank.a.notebook.verbs == ["begin", "prepare"]
            return xid

    with ThreadPoolExecutor(1) as pool:  # where the transaction stays current
        xid = pool.submit(begin_and_leave).result(PATIENCE_S)
    eventually(lambda: bank.a.notebook.verbs == ["begin", "prepare", "rollback_prepared"])
    assert bank.client.outcome(xid) is Outcome.ABORTED


def test_a_resource_that_refuses_to_prepare_rolls_everything_back(bank: Bank) -> None:
    with failpoint("participant.before_prepare", "error"):
        with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(timeout=LONG_S, manager=bank.client):
            with txrpc.final_call():
                bank.a.call("write", "one")
            bank.b.call("write", "two")
    eventually(lambda: "rollback_prepared" in bank.a.notebook.verbs)
    assert (bank.a.notebook.lines, bank.b.notebook.verbs) == ([], []), "the second call was not made any more"


def test_a_final_call_that_failed_does_not_vote(bank: Bank) -> None:
    """Its caller may go on without it, and call again: nothing was said of a call that did not do its work."""
    with txrpc.transaction(timeout=LONG_S, manager=bank.client, no_rollback_for=grpc.RpcError):
        with pytest.raises(grpc.RpcError), txrpc.final_call():
            bank.a.call("fail", "one")
        assert bank.a.notebook.verbs == ["begin"]
        bank.a.call("write", "two")
        bank.b.call("write", "two")
    assert bank.a.notebook.lines == ["one", "two"]


def test_outside_a_transaction_the_block_does_nothing(bank: Bank) -> None:
    with txrpc.final_call():
        assert txrpc.current_transaction() is None
    with txrpc.transaction(manager=bank.client), txrpc.final_call():
        with txrpc.transaction(propagation="requires_new", manager=bank.client):
            bank.a.call("write", "one")
            assert bank.a.notebook.verbs == ["begin"], "another transaction, of which that was not said"
            bank.b.call("write", "two")


# ---------------------------------------------------------------------------------------------------------- asyncio


class AsyncService:
    """`Service` for asyncio."""

    def __init__(self, name: str) -> None:
        self.notebook = AsyncMemoryResource(name)
        self.channel: Any = None

    async def start(self, coordinator: CoordinatorProcess) -> None:
        resource: Any = self.notebook  # whose verbs are coroutines, which no type checker sees
        self.manager = await txrpc.aio.connect(coordinator.address, resources=[resource], process=self.notebook.name)
        self.server = grpc.aio.server(interceptors=txrpc.aio.server_interceptors(self.manager))
        handlers = {
            "write": grpc.unary_unary_rpc_method_handler(self._write),
            "only": grpc.unary_unary_rpc_method_handler(
                txrpc.aio.transactional(final=True, manager=self.manager)(self._write)
            ),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=txrpc.aio.client_interceptors())

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop(0)
        await self.manager.close()

    async def call(self, method: str, line: str) -> Any:
        return await self.channel.unary_unary(f"/t.S/{method}")(line.encode())

    async def _write(self, request: bytes, _context: Any) -> bytes:
        await self.notebook.note(request.decode())
        return b"written"


@pytest.fixture
async def aio_bank(coordinator: CoordinatorProcess) -> AsyncIterator[tuple[AsyncService, AsyncService, Any]]:
    services = AsyncService("a"), AsyncService("b")
    for service in services:
        await service.start(coordinator)
    client = await txrpc.aio.connect(coordinator.address, process="client")
    yield (*services, client)
    await client.close()
    for service in services:
        await service.stop()


async def test_final_calls_vote_before_their_reply_and_commit_in_asyncio(
    aio_bank: tuple[AsyncService, AsyncService, Any],
) -> None:
    a, b, client = aio_bank
    async with txrpc.aio.transaction(timeout=LONG_S, manager=client):
        with txrpc.aio.final_call():
            await a.call("write", "one")
        assert a.notebook.verbs == ["begin", "prepare"]
        await b.call("only", "two")
        assert b.notebook.verbs == ["begin", "prepare"]
    assert (a.notebook.lines, b.notebook.lines) == (["one"], ["two"])
    assert a.notebook.verbs == b.notebook.verbs == ["begin", "prepare", "commit_prepared"]


async def test_rule_10_a_call_after_the_final_one_is_refused_in_asyncio(
    aio_bank: tuple[AsyncService, AsyncService, Any],
) -> None:
    a, _b, client = aio_bank
    with pytest.raises(txrpc.TransactionAborted, match="after the transaction's final call to this service"):
        async with txrpc.aio.transaction(timeout=LONG_S, manager=client):
            with txrpc.aio.final_call():
                await a.call("write", "one")
            await a.call("write", "again")
    assert a.notebook.lines == []
