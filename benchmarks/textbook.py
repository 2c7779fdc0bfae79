"""A coordinator as textbooks have it: begin, enlist, prepare and commit are calls of their own, and each decision is forced by itself.

Hand-written over psycopg, without recovery: what is compared is what the messages and the forced writes cost.

python -m benchmarks.textbook --listen 127.0.0.1:7400 --log /path/of/the/log
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psycopg
from sqlalchemy.engine import make_url

__all__ = ["Coordinator", "add_bank", "call"]

Say = dict[str, Any]


def call(channel: grpc.Channel, method: str) -> grpc.UnaryUnaryMultiCallable[Say, Say]:
    """Return what calls *method* with a value that JSON has."""
    return channel.unary_unary(
        f"/textbook/{method}", request_serializer=lambda say: json.dumps(say).encode(), response_deserializer=json.loads
    )


def _serve(server: grpc.Server, **methods: Callable[[Say], Say | None]) -> None:
    def handler(method: Callable[[Say], Say | None]) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _context: method(request) or {},
            request_deserializer=json.loads,
            response_serializer=lambda say: json.dumps(say).encode(),
        )

    handlers = {name: handler(method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("textbook", handlers),))


class Coordinator:
    """Transactions, each with the addresses of its participants, and a log of what was decided."""

    def __init__(self, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.Lock()
        self._members: dict[str, list[str]] = {}
        self._channels: dict[str, grpc.Channel] = {}

    def begin(self, _: Say) -> Say:
        xid = uuid.uuid4().hex
        self._members[xid] = []
        return {"xid": xid}

    def enlist(self, say: Say) -> None:
        self._members[say["xid"]].append(say["address"])

    def commit(self, say: Say) -> None:
        xid = say["xid"]
        members = self._members.pop(xid)
        self._all(members, "prepare", xid)
        with self._lock:
            os.write(self._log, f"{xid} committed\n".encode())
            os.fdatasync(self._log)
        self._all(members, "finish", xid)

    def _all(self, members: list[str], method: str, xid: str) -> None:
        asked = [call(self._channel(address), method).future({"xid": xid}) for address in members]
        for each in asked:
            each.result()

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = grpc.insecure_channel(address)
            return self._channels[address]

    def serve(self, listen: str) -> grpc.Server:
        """Start serving at *listen*."""
        server = grpc.server(ThreadPoolExecutor(40))
        _serve(server, begin=self.begin, enlist=self.enlist, commit=self.commit)
        server.add_insecure_port(listen)
        server.start()
        return server


def add_bank(server: grpc.Server, name: str, database: str) -> None:
    """Let *server* do one side of a transfer, prepare it, and finish it."""
    url = make_url(database).set(drivername="postgresql").render_as_string(hide_password=False)
    pool: queue.SimpleQueue[psycopg.Connection[Any]] = queue.SimpleQueue()
    for _ in range(40):
        pool.put(psycopg.connect(url))
    open_work: dict[str, psycopg.Connection[Any]] = {}

    def add(say: Say) -> None:
        connection = open_work[say["xid"]] = pool.get()
        connection.execute("UPDATE account SET cents = cents + %(cents)s WHERE name = %(account)s", say)
        connection.execute("INSERT INTO journal (account, cents) VALUES (%(account)s, %(cents)s)", say)

    def prepare(say: Say) -> None:
        connection = open_work.pop(say["xid"])
        connection.execute(f"PREPARE TRANSACTION 'textbook-{say['xid']}-{name}'".encode())
        pool.put(connection)

    def finish(say: Say) -> None:
        connection = pool.get()
        connection.autocommit = True
        connection.execute(f"COMMIT PREPARED 'textbook-{say['xid']}-{name}'".encode())
        connection.autocommit = False
        pool.put(connection)

    _serve(server, add=add, prepare=prepare, finish=finish)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--log", required=True)
    arguments = parser.parse_args()
    _server = Coordinator(arguments.log).serve(arguments.listen)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    print("serving", flush=True)
    over.wait()


if __name__ == "__main__":
    main()
