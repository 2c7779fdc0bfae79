"""A group of members in this process, each with its own disk and a real gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from tests.waiting import eventually
from txrpc._decision_log.port import LogError
from txrpc._group.member import GroupMember
from txrpc._group.members import founders
from txrpc._protocol.quorum.views import View
from txrpc._protocol.takeover import NodeRow
from txrpc._wire.v1 import peer_pb2_grpc
from txrpc.testing.processes import free_port


class RunningGroup:
    """Members that may be stopped, started again, and given an empty disk."""

    def __init__(self, folder: Path, size: int = 3, reads: int = 0, writes: int = 0) -> None:
        names = [f"c{number + 1}" for number in range(size)]
        text = ",".join(f"{name}=127.0.0.1:{free_port()}" for name in names)
        self.members = founders(text, reads, writes)
        self.addresses = dict(self.members.addresses)
        self.running: dict[str, GroupMember] = {}
        self.joining: dict[str, Future[bool]] = {}
        self._pool = ThreadPoolExecutor(8)
        self._closed = threading.Event()
        self._folder = folder
        self._servers: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.db"

    def start(self, *names: str, timeout_s: float = 20.0) -> list[bool]:
        """Start these members, or all, and wait until they have joined; whether each has."""
        starting = names or self.members.names
        for name in starting:
            self._start(name, self.members)
        with ThreadPoolExecutor(len(starting)) as pool:
            return list(pool.map(lambda name: self.running[name].join(timeout_s), starting))

    def newcomer(self, name: str) -> str:
        """Start one that is no member yet; it waits to become one.  Returns its address."""
        self.addresses[name] = f"127.0.0.1:{free_port()}"
        text = ",".join(f"{name}={address}" for name, address in self.addresses.items())
        self._start(name, founders(text))
        self.joining[name] = self.joins(name)
        return self.addresses[name]

    def joins(self, name: str) -> Future[bool]:
        """Let it try to join until it has, or the group is closed."""
        member = self.running[name]
        return self._pool.submit(lambda: any(member.join(0.5) for _ in iter(self._closed.is_set, True)))

    def _start(self, name: str, view: View) -> None:
        member = GroupMember("bank", name, view, str(self.path(name)))
        self.running[name] = member
        self._servers[name] = self._run(self._serve, name, member)

    def stop(self, name: str) -> None:
        self._run(self._servers.pop(name).stop, None)
        self.running.pop(name).close()

    def beat(self, name: str) -> Sequence[NodeRow]:
        """Let a member beat until enough of the others have answered in time: a coordinator only tries again later."""
        rows: Sequence[NodeRow] = ()

        def heard() -> bool:
            nonlocal rows
            with contextlib.suppress(LogError):
                rows = self.running[name].heartbeats.beat()
                return True
            return False

        eventually(heard, 20)
        return rows

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown()
        for name in list(self.running):
            self.stop(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, name: str, member: GroupMember) -> Any:
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        # As the coordinator's: else it ends connections whose peers it was too slow to answer.
        options += [("grpc.http2.max_ping_strikes", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000)]
        server = grpc.aio.server(options=options)
        peer_pb2_grpc.add_PeerServicer_to_server(member.service(), server)
        server.add_insecure_port(self.addresses[name])
        await server.start()
        return server

    def _run(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(verb(*arguments), self._loop).result(30)
