"""Rule 13, F10: an outcome that could not be learnt is asked for again, and told as soon as it can be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

import txrpc
import txrpc.sql
from tests.postgres import Server
from tests.sql.kit import Proxy
from tests.waiting import eventually
from txrpc._client import effects
from txrpc.testing.processes import CoordinatorProcess


def test_rule_13_a_commit_elsewhere_whose_database_went_away_is_learnt_when_it_is_back(
    servers: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "_ASK_AFTER_S", (0.0, 0.1, 0.1))  # half a minute, shortened
    server = servers["bank-a"]
    url = sa.make_url(server.create_database("unknown"))
    server.execute("CREATE TABLE entry (name text)", "unknown")
    with CoordinatorProcess(tmp_path) as coordinator, Proxy(url.host or "", url.port or 5432) as proxy:
        engine = sa.create_engine(proxy.url(str(url)))
        bank = txrpc.sql.ResourceManager("bank", engine)

        def put(_request: bytes, _context: object) -> bytes:
            with bank.connection() as connection:
                connection.execute(sa.text("INSERT INTO entry VALUES ('a')"))
            return b""

        with (
            txrpc.connect(coordinator.address, resources=[bank], process="service") as service,
            txrpc.connect(coordinator.address, process="client") as client,
        ):
            methods = grpc.server(ThreadPoolExecutor(4), interceptors=txrpc.server_interceptors(service))
            handlers = {"Put": grpc.unary_unary_rpc_method_handler(put)}
            methods.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", handlers),))
            port = methods.add_insecure_port("127.0.0.1:0")
            methods.start()

            def break_off() -> None:
                eventually(lambda: server.execute("SELECT name FROM entry", "unknown"))
                proxy.refusing = 1_000_000
                proxy.lost.wait(30)  # the answer to COMMIT
                proxy.cut()

            sa.event.listen(engine, "commit", lambda _connection: proxy.mute())
            breaker = threading.Thread(target=break_off)
            breaker.start()
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                intercepted: Any = grpc.intercept_channel(channel, *txrpc.client_interceptors())
                stub = intercepted.unary_unary("/t.S/Put")
                with pytest.raises(txrpc.OutcomeUnknown), txrpc.transaction(timeout=30, manager=client) as tx:
                    stub(b"")
            breaker.join()
            proxy.refusing = 0
            eventually(lambda: client.outcome(tx.xid, timeout=15) is txrpc.Outcome.COMMITTED)
            methods.stop(0).wait()
        engine.dispose()
    server.execute("DROP DATABASE unknown WITH (FORCE)")
