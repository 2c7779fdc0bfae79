"""A program with a coordinator inside: python -m tests.system.embedded_program LOG DATABASE DATABASE writes a row into each.

--decides: the first of them decides.  --wait: nothing is written; what an earlier run has left is finished.
"""

from __future__ import annotations

import sys
import threading

import sqlalchemy as sa

import txrpc
import txrpc.sql


def main(log: str, *databases: str) -> None:
    decides = "--decides" in sys.argv
    resources = [
        txrpc.sql.ResourceManager(f"db-{n}", sa.create_engine(url), decides=decides and not n)
        for n, url in enumerate(databases)
    ]
    with txrpc.embedded(log, resources=resources, process="embedded program"):
        print("ready", flush=True)
        if "--wait" in sys.argv:
            threading.Event().wait()
        with txrpc.transaction(timeout=5, decide_in="db-0" if decides else None):
            for resource in resources:
                with resource.connection() as connection:
                    connection.execute(sa.text("INSERT INTO entry VALUES (1)"))
        print("told committed", flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
