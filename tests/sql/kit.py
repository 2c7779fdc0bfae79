"""What the tests of the resource managers share: a table, identifiers, and a server's end that can be cut off."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import txrpc.sql
from txrpc._protocol.messages import Outcome
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, Xid

__all__ = ["Base", "Make", "Proxy", "Row", "ended", "gid", "insert", "rows"]

numbers = itertools.count(1)
Make = Callable[..., txrpc.sql.ResourceManager]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "entry"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


def gid(number: int | None = None, **changes: Any) -> Gid:
    branch = BranchId((next(numbers) if number is None else number).to_bytes(8, "big"))
    fields: dict[str, Any] = {"group": "default", "node": "c1", "epoch": Epoch.make(1, 1), "resource": "bank"}
    fields |= changes
    return Gid(xid=Xid(os.urandom(16)), branch=branch, participant=ParticipantId(bytes(8)), **fields)


def insert(work: Any, name: str = "a") -> None:
    work.connection.execute(sa.text("INSERT INTO entry VALUES (:n, 1)"), {"n": name})


def ended(resource: Any, work: Any, committing: Callable[[str], None]) -> Outcome:
    """Commit *work* in one phase, and if its connection broke ask how it ended until that is known."""
    outcome: Outcome | None = resource.commit_one_phase(work, committing)
    until = time.monotonic() + 30
    while outcome is None:
        assert time.monotonic() < until, "the database does not tell how the commit ended"
        time.sleep(0.05)
        outcome = resource.how_it_ended(work)
    return outcome


def rows(resource: txrpc.sql.ResourceManager) -> list[str]:
    with resource.engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT name FROM entry ORDER BY name")))


_ENCRYPTION_REQUEST = 8
"""The length of what a client may ask before it introduces itself."""


class Proxy:
    """Stands between a client and its server, on a port of its own.

    `cut` tells the clients that their connections are gone; the server's ends stay open, as after a failure of the network.
    After `mute` nothing that the server says gets through on the connections that there are; after `deafen`, nothing that clients
    say; `lost` is set when something was lost that way.  `move` gives each client another backend.
    The next `refusing` clients are turned away.
    *pid*: the process id that clients are told instead of their backend's, as a connection pooler would.
    """

    def __init__(self, host: str, port: int, pid: int | None = None) -> None:
        self._target = (host, port)
        self._pid = pid
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.lost = threading.Event()
        self._silent: set[socket.socket] = set()
        self._startups: dict[socket.socket, bytes] = {}
        self._moved: dict[socket.socket, socket.socket] = {}
        self._ended: list[socket.socket] = []
        self.refusing = 0
        self._clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, url: str) -> sa.URL:
        """*url* through the proxy."""
        return sa.make_url(url).set(host="127.0.0.1", port=self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for end in (self._listener, *self._clients, *self._servers, *self._ended):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        for client in list(self._clients):  # not those who come back at once
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def mute(self) -> None:
        self._silent.update(self._servers)

    def deafen(self) -> None:
        self._silent.update(self._clients)

    def move(self) -> None:
        """Give each client a new backend in place of its own, as a pooler may between two statements; its old one ends."""
        for client, startup in self._startups.items():
            server = socket.create_connection(self._target)
            server.sendall(startup)
            said = b""
            while not said.endswith(b"Z\x00\x00\x00\x05I"):  # ready, and in no transaction
                said += server.recv(65536)
            old = self._servers[self._clients.index(client)]
            self._servers[self._servers.index(old)] = self._moved[client] = server
            self._ended.append(old)
            old.shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refusing:
                    self.refusing -= 1
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._clients.append(client)
                self._servers.append(server)
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source in self._clients and len(data) != _ENCRYPTION_REQUEST:
                    self._startups.setdefault(source, data)
                if source in self._silent:
                    self.lost.set()
                else:
                    self._moved.get(source, sink).sendall(self._disguise(data))
            if source in self._servers:
                sink.shutdown(socket.SHUT_RDWR)

    def _disguise(self, data: bytes) -> bytes:
        if self._pid is None or (at := data.find(b"K\x00\x00\x00\x0c")) < 0:
            return data
        return data[: at + 5] + self._pid.to_bytes(4, "big") + data[at + 9 :]
