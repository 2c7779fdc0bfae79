"""A coordinator that says what a test's script says, byte by byte if need be; and the two sessions behind one face."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from txrpc._grpc.session import Session
from txrpc._grpc.session_async import AsyncSession
from txrpc._protocol import messages as m
from txrpc._wire.codec import decode_process_batch, encode_from_coordinator
from txrpc._wire.v1 import session_pb2
from txrpc.errors import ConfigurationError, CoordinatorUnavailable
from txrpc.ids import Epoch, ParticipantId, Xid
from txrpc.options import SessionOptions

OWNER = m.Owner("scripted", Epoch.make(1, 1))
QUICK = SessionOptions(connect_timeout_s=2.0, backoff_initial_s=0.02, backoff_max_s=0.1)

Said = m.FromCoordinator | bytes
Script = Callable[["Talk"], Iterator[Said]]


class Talk:
    """One session as the coordinator sees it."""

    def __init__(self, raw: Iterator[bytes], context: grpc.ServicerContext) -> None:
        self._raw = raw
        self.context = context
        self.sizes: list[int] = []
        self.counts: list[int] = []
        self.started_at = time.monotonic()

    def batches(self) -> Iterator[list[m.ToCoordinator]]:
        """What the process says, until it ends the stream."""
        for data in self._raw:
            items = decode_process_batch(session_pb2.ProcessBatch.FromString(data))
            assert {node for node, message in items if not isinstance(message, m.Hello)} <= {OWNER.node}
            messages = [message for _, message in items]
            self.sizes.append(len(data))
            self.counts.append(len(messages))
            yield messages


class ScriptedCoordinator:
    """A gRPC server of this process.  Each session runs the next script; the last one again and again."""

    def __init__(self, *scripts: Script, secure: bool = False, service: str = "txrpc.v1.Coordinator") -> None:
        self._scripts = list(scripts)
        self.talks: list[Talk] = []
        self.hellos: list[m.ToCoordinator] = []
        self.received: list[m.ToCoordinator] = []
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        method = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Session": method}),))
        if secure:
            self.port = self._server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
        else:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(10)
        self._pool.shutdown(wait=True)

    def _session(self, raw: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        talk = Talk(raw, context)
        self.talks.append(talk)
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        first = next(talk.batches())
        self.hellos.append(first[0])
        self.received.extend(first[1:])
        for said in script(talk):
            yield said if isinstance(said, bytes) else encode_from_coordinator(OWNER.node, (said,)).SerializeToString()


def welcome(max_message_bytes: int = 4 << 20) -> m.Welcome:
    return m.Welcome(OWNER, 1, 600_000, 256, max_message_bytes)


def request(number: int = 0) -> m.OutcomeRequest:
    return m.OutcomeRequest(Xid(number.to_bytes(16, "big")), OWNER.epoch, 1)


def number_of(message: Any) -> int:
    return int.from_bytes(message.xid, "big")


def listen(talk: Talk) -> Iterator[Said]:
    """The ordinary one: welcomes, and answers every outcome request."""
    yield welcome()
    for batch in talk.batches():
        answers = [m.OutcomeReply(x.xid, m.Outcome.COMMITTED) for x in batch if isinstance(x, m.OutcomeRequest)]
        yield encode_from_coordinator(OWNER.node, answers).SerializeToString()


def say(*said: Said) -> Script:
    """Say this and end the stream."""
    return lambda _talk: iter(said)


def say_and_stay(*said: Said) -> Script:
    """Say this and listen until the process ends the stream."""

    def script(talk: Talk) -> Iterator[Said]:
        yield from said
        for _batch in talk.batches():
            pass

    return script


class Notes:
    """The callbacks of a session, which write down what they are told."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.hellos = 0
        self.welcomes: list[m.Welcome] = []
        self.messages: list[m.FromCoordinator] = []
        self.losses: list[str] = []
        self.order: list[str] = []
        self.fail_in: set[str] = set()
        self.at_message: Callable[[], object] = lambda: None

    def hello(self, _session: Any) -> m.Hello:
        self.hellos += 1
        self._note("hello", None)
        return m.Hello(m.PROTOCOL_VERSION, "default", ParticipantId(os.urandom(8)), f"hello {self.hellos}")

    def on_welcome(self, _session: Any, said: m.Welcome) -> None:
        self._note("welcome", lambda: self.welcomes.append(said))

    def on_message(self, _session: Any, node: str, message: m.FromCoordinator) -> None:
        assert node == self.welcomes[-1].owner.node
        self.at_message()
        self._note("message", lambda: self.messages.append(message))

    def on_lost(self, _session: Any, text: str) -> None:
        self._note("lost", lambda: self.losses.append(text))

    def on_refused(self, _session: Any) -> None:
        self._note("refused", None)

    def _note(self, what: str, do: Callable[[], None] | None) -> None:
        with self._changed:
            if do is not None:
                do()
                self.order.append(what)
            self._changed.notify_all()
        if what in self.fail_in:
            raise RuntimeError(f"{what} fails on purpose")

    def wait(self, until: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Wait until *until*; it is asked after every callback and now and then."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while not until():
                left_s = end - time.monotonic()
                assert left_s > 0, f"waited {timeout_s} s in vain; {self.order[-20:]=} {self.losses[-3:]=}"
                self._changed.wait(min(left_s, 0.02))


class Face:
    """A session of either colour, used from a plain thread.  The asyncio one lives on a loop of its own in another thread."""

    def __init__(self, colour: str, address: str, notes: Notes, **more: Any) -> None:
        self.notes = notes
        self.session: Session | AsyncSession
        more.setdefault("options", QUICK)
        self._loop: asyncio.AbstractEventLoop | None = None
        if colour == "sync":
            self.session = Session(address, notes, **more)
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop of the session")
        self._thread.start()
        self.session = AsyncSession(address, notes, **more)

    def _do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self.session, method)
        if self._loop is None:
            return call(*args, **kwargs)

        async def on_the_loop() -> Any:
            result = call(*args, **kwargs)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(on_the_loop(), self._loop).result(30)

    def start(self) -> None:
        self._do("start")

    def send(self, *messages: m.ToCoordinator) -> None:
        node = self.notes.welcomes[-1].owner.node if self.notes.welcomes else OWNER.node
        self._do("send", node, *messages)

    def wait_connected(self, timeout_s: float = 20.0) -> m.Welcome:
        """Wait for a session; raise what a client would raise."""
        with contextlib.suppress(AssertionError):
            self.notes.wait(lambda: self.session._welcome is not None or self.session.over, timeout_s)
        if self.session.refused:
            raise ConfigurationError(self.session.trouble)
        if (welcome := self.session._welcome) is None:
            raise CoordinatorUnavailable(f"no session with the coordinator: {self.session.trouble}")
        return welcome

    def close(self, grace_s: float = 2.0) -> None:
        self._do("close", grace_s)

    def dispose(self) -> None:
        """Close it, and the loop behind."""
        self.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()
            self._loop = None
