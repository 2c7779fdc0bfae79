"""A program with a coordinator inside: python -m tests.system.embedded_program LOG DATABASE DATABASE writes a row into each."""

from __future__ import annotations

import sys
import threading

import sqlalchemy as sa

import txrpc
import txrpc.sql


def main(log: str, *databases: str) -> None:
    resources = [txrpc.sql.ResourceManager(f"db-{n}", sa.create_engine(url)) for n, url in enumerate(databases)]
    with txrpc.embedded(log, resources=resources, process="embedded program"):
        print("ready", flush=True)
        if "--wait" in sys.argv:
            threading.Event().wait()
        with txrpc.transaction(timeout=5):
            for resource in resources:
                with resource.connection() as connection:
                    connection.execute(sa.text("INSERT INTO row VALUES (1)"))
        print("told committed", flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--wait"])
