"""A way between a client and its server that can be held up, slowed and cut, where machines of their own cannot be had."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

__all__ = ["Way"]


class Way:
    """Stands between, on a port of its own.  Nothing that is held is lost: like TCP, it goes on when the way is open again."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self._there, self._back = threading.Event(), threading.Event()
        self._ends: list[socket.socket] = []
        self._over = False
        self._lock = threading.Lock()
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.heal()
        with self._lock:
            self._over = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for the next client
        self._listener.close()
        self.reset()

    def hold(self, there: bool = True, back: bool = True) -> None:
        """What goes *there*, and what comes *back*, waits until `heal`."""
        for closed, way in ((there, self._there), (back, self._back)):
            if closed:
                way.clear()

    def heal(self) -> None:
        """All is open, and as fast as it can be."""
        self.delay_s = 0.0
        self._there.set()
        self._back.set()

    def reset(self) -> None:
        """Every connection breaks at once, with what is under way in it."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target, timeout=10)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                with self._lock:
                    if self._over:
                        client.close()
                        server.close()
                        return
                    self._ends += [client, server]
                for source, sink, way in ((client, server, self._there), (server, client, self._back)):
                    threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay_s)
                way.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
