"""A service that appends to lists, reads them and moves money, in a database of its own: python -m tests.histories.service ..."""

from __future__ import annotations

import argparse
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from sqlalchemy import create_engine, text

import txrpc
import txrpc.sql

METHOD = "/histories.Lists/Do"
LISTS, ACCOUNTS = 4, 4
TABLES = f"""
    CREATE TABLE list (name text PRIMARY KEY, held bigint[] NOT NULL DEFAULT '{{}}');
    INSERT INTO list (name) SELECT 'l' || n FROM generate_series(1, {LISTS}) n;
    CREATE TABLE account (name text PRIMARY KEY, cents bigint NOT NULL DEFAULT 0);
    INSERT INTO account (name) SELECT 'a' || n FROM generate_series(1, {ACCOUNTS}) n
"""
READ = text("SELECT held FROM list WHERE name = :name")
LOCKED = text("SELECT held FROM list WHERE name = :name FOR SHARE")
APPEND = text("UPDATE list SET held = array_append(held, :value) WHERE name = :name")
MOVE = text("UPDATE account SET cents = cents + :cents WHERE name = :name")


class Lists:
    """Takes a list of deeds as JSON, and returns what each read."""

    def __init__(self, database: txrpc.sql.ResourceManager) -> None:
        self._database = database

    @txrpc.transactional
    def do(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        with self._database.connection() as connection:
            return json.dumps([self._one(connection, *scenario) for scenario in json.loads(request)]).encode()

    def _one(self, connection: Any, verb: str, name: str, value: int) -> Any:
        match verb:
            case "append":
                connection.execute(APPEND, {"name": name, "value": value})
            case "move":
                connection.execute(MOVE, {"name": name, "cents": value})
            case _:
                return connection.scalar(LOCKED if verb == "read locked" else READ, {"name": name})
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--name", "--listen", "--database", "--coordinator"):
        parser.add_argument(option, required=True)
    arguments = parser.parse_args()
    database = txrpc.sql.ResourceManager(arguments.name, create_engine(arguments.database, pool_size=12))
    with txrpc.connect(arguments.coordinator, resources=[database], process=arguments.name):
        server = grpc.server(ThreadPoolExecutor(12), interceptors=txrpc.server_interceptors())
        service, _, method = METHOD[1:].partition("/")
        handler = grpc.unary_unary_rpc_method_handler(Lists(database).do)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        server.add_insecure_port(arguments.listen)
        server.start()
        print("serving", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
