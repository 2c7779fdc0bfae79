"""The session of a synchronous process: one bidirectional stream to the coordinator, kept up by a daemon thread.

How to think of it
    The thread connects, says Hello, waits for the Welcome and then reads until the stream ends; then it reports the loss, waits
    a little and connects anew, on a new channel.  gRPC pulls what is to be sent from an iterator, which hands out everything
    that is waiting as one batch.

    What was queued for a stream that broke is dropped, and whether it arrived is not known.  Nothing is lost by that: code that
    waits for an answer is told by `on_lost`, which comes after the last `send` that the stream took, and asks for the outcome
    on the next session; branches in doubt ask again on every welcome.

    A fork takes the object along but neither the thread nor gRPC's, and perhaps a lock that no thread will release: so every
    method looks at the process id before it touches anything else.  Measured with grpcio 1.85: a session of the child's own
    usually works even though gRPC ran in the parent, but not always, and never with GRPC_ENABLE_FORK_SUPPORT=0.  Connecting
    only after the fork always works.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from txrpc._grpc.batches import TOO_SLOW, FromNode, Refused, Waiting, check_first, parse, passing
from txrpc._grpc.link import METHOD, Backoff, Link, channel_options
from txrpc._protocol.messages import Welcome
from txrpc.options import SessionOptions

__all__ = ["Session"]


class _Outgoing:
    """What waits for one stream, as the iterator that gRPC pulls batches from."""

    def __init__(self, options: SessionOptions, abandon: Callable[[str], None]) -> None:
        self.waiting = Waiting(options)
        self._abandon = abandon
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._gone = b""

    def put(self, encoded: list[bytes]) -> bool:
        """Queue *encoded*; False if the stream is over, or must be because its peer does not read: then nothing was queued."""
        with self._changed:
            if self._closed:
                return False
            self._closed = full = not self.waiting.add(encoded)
            self._changed.notify()
        if full:
            self._abandon(TOO_SLOW)
        return not full

    def close(self) -> None:
        """End the iterator.  What is queued goes out first if the stream still lives."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        passing("after", self._gone)  # gRPC asks for the next batch once it has taken one
        self._gone = self._next()
        passing("before", self._gone)
        return self._gone

    def _next(self) -> bytes:
        while True:
            with self._changed:
                if self.waiting:
                    return self.waiting.take()
                if self._closed:
                    raise StopIteration
                self._changed.wait()
            # Where one thread sends others are about to: let them, and one batch takes all (measured: a quarter more a second).
            time.sleep(0)


class Session(Link):
    """See the module's docstring.  `send` is for any thread; the callbacks run on the session's own and must not block."""

    _connect = "txrpc.connect()"

    def _set_up(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._call: Any = None
        self._welcomed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="txrpc-session", daemon=True)

    def start(self) -> None:
        """Begin to connect, in the background.  Once only.  An interpreter that ends without `close` closes it."""
        self._check_process()
        self.last_error = f"the coordinator at {self.address} has not answered yet"
        _open.add(self)
        self._thread.start()

    def drain(self) -> None:
        """See `SessionPort` of `txrpc._client.client`: the coordinator is elsewhere."""

    def close(self, grace_s: float = 2.0) -> None:
        """End the session for good.  What is queued still goes out, within *grace_s* seconds.  Calling it twice is fine.

        In a forked child it does nothing: the session is the parent's.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            outgoing, call = self._outgoing, self._call
            self._changed.notify_all()
        _open.discard(self)
        if outgoing is not None:
            outgoing.close()
        elif call is not None:
            call.cancel()
        if not self._thread.is_alive() or self._thread is threading.current_thread():
            return
        self._thread.join(grace_s)
        if self._thread.is_alive() and call is not None:
            call.cancel()
            self._thread.join(1.0)

    def wait_answered(self, timeout_s: float) -> None:
        """Wait until the first attempt to connect has ended in one way or the other, at most *timeout_s* seconds."""
        with self._changed:
            self._changed.wait_for(self._answered, timeout_s)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        backoff = Backoff(self._options)
        while not self._closed and self._refused is None:
            error: Exception | None = None
            try:
                self._connect_and_read()
            except Exception as caught:
                # gRPC raises the call itself, and the frames of its traceback hold it too: see `_forget_call`.
                error = caught.with_traceback(None)
            lived_s, at_once = self._ended(error), not isinstance(error, Refused)
            error = None
            with self._changed:
                if not self._closed and self._refused is None:
                    self._changed.wait(backoff.next_s(lived_s, at_once=at_once))

    def _connect_and_read(self) -> None:
        self._abandoned = ""
        hello = self._user.hello(self)
        with self._channel() as channel:
            outgoing = _Outgoing(self._options, self._abandon)
            outgoing.put(outgoing.waiting.encode("", (hello,)))
            call = channel.stream_stream(METHOD)(outgoing)
            with self._changed:
                self._call = call
                if self._closed:
                    call.cancel()
            try:
                welcome, rest = self._first(call)
                self._established(welcome, rest, outgoing)
                for data in call:
                    self._deliver(welcome.owner.node, parse(data))
            finally:
                outgoing.close()
                call.cancel()
                self._forget_call()
                del call

    def _forget_call(self) -> None:
        """Let the call be deleted here and now, not by the interpreter's last collection.

        Deleting it takes its lock, which gRPC's own threads take too.  They are daemons: the end of the interpreter stops them
        wherever they are, perhaps with that lock, and a call that is deleted after that waits for ever (measured: one exit in
        two hundred on a busy machine).
        """
        with self._changed:
            self._call = None

    def _channel(self) -> Any:
        options = channel_options(self._options)
        if self._credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self._credentials, options=options)

    def _first(self, call: Iterator[bytes]) -> tuple[Welcome, list[FromNode]]:
        # Bounds the whole attempt: connecting, the handshake, and a coordinator that never says Welcome.
        guard = threading.Timer(self._options.connect_timeout_s, self._abandon, (self._why(TimeoutError()),))
        guard.daemon = True
        guard.start()
        try:
            data = next(call, None)
        finally:
            guard.cancel()
        return check_first(parse(data) if data is not None else [])

    def _abandon(self, text: str) -> None:
        self._abandoned = text
        with self._changed:
            call = self._call
        if call is not None:
            call.cancel()

    def _established(self, welcome: Welcome, rest: list[FromNode], outgoing: _Outgoing) -> None:
        outgoing.waiting.max_bytes = self._limit(welcome)
        self._log_established(welcome)
        self._welcomed_at = time.monotonic()
        self._outgoing = outgoing
        self._user.on_welcome(self, welcome)
        self._deliver(welcome.owner.node, rest)
        # Last: code that waits for the session finds that all callbacks have run, and all that came with the welcome is known.
        with self._changed:
            self._welcome, self.last_error = welcome, ""
            self._changed.notify_all()

    def _ended(self, error: Exception | None) -> float:
        """Note that the stream, or the attempt at one, is over; return for how many seconds it was established."""
        with self._changed:
            established, self._outgoing, self._welcome = self._outgoing is not None, None, None
            self._note_end(error)
            self._changed.notify_all()
        self._log_end(established)
        return time.monotonic() - self._welcomed_at if established else 0.0


_open: set[Session] = set()


@atexit.register
def _close_all() -> None:
    """An interpreter that goes down under a thread that reads from gRPC may crash, and cannot start the next attempt's threads."""
    for session in list(_open):
        session.close(grace_s=0.5)
