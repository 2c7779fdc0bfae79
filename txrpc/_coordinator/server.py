"""The coordinator process: engine, gRPC server, health, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from txrpc._coordinator.admin import AdminService, library_version
from txrpc._coordinator.config import CoordinatorConfig
from txrpc._coordinator.host import Host
from txrpc._coordinator.service import SessionService
from txrpc._coordinator.tls import credentials, peer_credentials
from txrpc._decision_log.port import DecisionLog, Heartbeats
from txrpc._etcd.url import is_etcd
from txrpc._group.member import GroupMember
from txrpc._group.replica import NoQuorum
from txrpc._wire.v1 import admin_pb2, admin_pb2_grpc, peer_pb2_grpc, session_pb2, session_pb2_grpc
from txrpc.errors import ConfigurationError, Fenced, LogBehind, TxrpcError

__all__ = [
    "BEHIND",
    "EXIT_CODES",
    "FAILED",
    "FENCED",
    "LOG_CLOSED",
    "MISCONFIGURED",
    "NO_ADDRESS",
    "REMOVED",
    "bind",
    "make_server",
    "run",
    "serve",
    "watch_health",
]

logger = logging.getLogger("txrpc.coordinator")

FAILED, MISCONFIGURED, LOG_CLOSED, FENCED, NO_ADDRESS, BEHIND, REMOVED = 1, 2, 3, 4, 5, 6, 7
EXIT_CODES: Final = {
    0: "told to stop",
    FAILED: "a mistake in txrpc: its log line has the details",
    MISCONFIGURED: "bad configuration",
    LOG_CLOSED: "the decision log cannot be opened",
    FENCED: "fenced: a later coordinator has opened the log",
    NO_ADDRESS: "cannot listen on the address",
    BEHIND: "the log has lost decisions: see docs/operating.md before starting again",
    REMOVED: "removed from the group",
}

_HEALTH_S = 0.5
_JOIN_S = 1.0
_SNAPSHOT_BYTES = 512 * 1024 * 1024
SERVICES = ("", "txrpc.v1.Coordinator")
_LOOPBACK = ("127.", "localhost:", "[::1]")


async def serve(
    config: CoordinatorConfig,
    make_log: Callable[[], DecisionLog],
    heartbeats: Heartbeats | None = None,
    tls: grpc.ServerCredentials | None = None,
    member: GroupMember | None = None,
) -> int:
    """Run until told to stop (SIGTERM, SIGINT), fenced or broken; returns the exit code.

    *make_log*: one more access to the decision log, for each coordinator that runs here.
    *member*: of the group whose log it is.
    Raises `ConfigurationError` when the log cannot be opened.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host = Host(config, make_log, heartbeats)
    server, health_service = make_server(config, host, member)
    try:
        address = bind(server, config, tls)  # before the log: opening that would fence a coordinator that has the port
    except ConfigurationError as error:
        logger.error("cannot listen", extra={"reason": str(error)})
        return NO_ADDRESS
    if not await _start(server, host, member, stop):
        return 0
    fields = {"address": address, "node": config.node, "group": config.group, "epoch": str(host.home.owner.epoch)}
    logger.info("listening", extra={**fields, "version": library_version()})
    watches = [loop.create_task(watch_health(host, health_service))]
    if member is not None:
        watches.append(loop.create_task(_watch_group(member, stop)))
    code = _code_of(await host.until_over(stop))
    for watch in watches:
        watch.cancel()
    await asyncio.gather(*watches, return_exceptions=True)
    await health_service.enter_graceful_shutdown()
    if code == 0:
        logger.info("shutting down", extra={"deciding": sum(each.core.deciding for each in host.drivers)})
        await host.drain()
    await server.stop(grace=1.0)
    await host.stop()
    state = host.home.core.state
    logger.info("stopped", extra={"committed": state.committed, "aborted": state.aborted})
    return REMOVED if code == 0 and member is not None and member.was_removed else code


async def _start(server: grpc.aio.Server, host: Host, member: GroupMember | None, stop: asyncio.Event) -> bool:
    """Open the home's log and serve; False if told to stop before that was possible."""
    try:
        if member is None:
            await host.start()
            await server.start()
            return True
        await server.start()  # first: the other members ask this one, and only together they have a log
        if await _join(member, host, stop):
            return True
    except BaseException:
        await server.stop(grace=None)
        raise
    await server.stop(grace=1.0)
    return False


async def _join(member: GroupMember, host: Host, stop: asyncio.Event) -> bool:
    """Become a member of the group and open the home's log, when a quorum is there; False if told to stop."""
    said = ""
    while not stop.is_set():
        try:
            if await asyncio.to_thread(member.join, _JOIN_S):
                await host.start()
                return True
        except NoQuorum as error:
            if str(error) != said:
                said = str(error)
                logger.warning("waiting for the group", extra={"reason": said})
            await asyncio.sleep(_JOIN_S / 4)
    return False


def _code_of(error: BaseException | None) -> int:
    if error is None:
        return 0
    return FENCED if isinstance(error, Fenced) else BEHIND if isinstance(error, LogBehind) else FAILED


def make_server(config: CoordinatorConfig, host: Host, member: GroupMember | None = None) -> tuple[Any, Any]:
    """Return a gRPC server for the coordinators of *host*, which is not started, and its health service."""
    # A member is given whole logs in one message; what a session sends is measured when it is read.
    longest = config.max_message_bytes if member is None else max(config.max_message_bytes, _SNAPSHOT_BYTES)
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", longest),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
            # gRPC 1.85 heeds the keepalive timeout only up to this one, which is a minute by default.
            ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        ]
    )
    sessions = SessionService(host, config.limits())
    session_pb2_grpc.add_CoordinatorServicer_to_server(sessions, server)
    if member is not None:
        peer_pb2_grpc.add_PeerServicer_to_server(member.service(), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(host, sessions, config.group, member), server)
    health_service: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    names = [
        session_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name,
        admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
        health.SERVICE_NAME,
        reflection.SERVICE_NAME,
    ]
    reflection.enable_server_reflection(names, server)
    return server, health_service


def bind(server: grpc.aio.Server, config: CoordinatorConfig, tls: grpc.ServerCredentials | None) -> str:
    """Give *server* its address, and return that; raises `ConfigurationError` if it cannot be had."""
    host, port = config.address()
    try:
        bound = server.add_insecure_port(config.listen) if tls is None else server.add_secure_port(config.listen, tls)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigurationError(
            f"cannot listen on {config.listen}: the port is taken, or the address is not this machine's"
        )
    address = f"{host}:{bound or port}"
    if tls is None and not config.listen.startswith(_LOOPBACK):
        logger.warning("no TLS: any process that reaches this address can end transactions", extra={"address": address})
    return address


async def watch_health(host: Host, service: Any) -> None:
    """SERVING while the log takes decisions."""
    shown: object = None
    while True:
        status = health_pb2.HealthCheckResponse
        now = status.NOT_SERVING if host.home.core.state.log_trouble else status.SERVING
        if now != shown:
            for name in SERVICES:
                await service.set(name, now)
            shown = now
        await asyncio.sleep(_HEALTH_S)


async def _watch_group(member: GroupMember, stop: asyncio.Event) -> None:
    """Stop when this node is no member any more, and the one that has asked it for that has its answer."""
    while not member.was_removed or member.changes.under_way:
        await asyncio.sleep(_HEALTH_S)
    logger.warning("removed from the group", extra={"members": ",".join(member.view.names)})
    stop.set()


def run(config: CoordinatorConfig) -> int:
    """`serve` in an event loop of its own, with the log that *config* names."""
    try:
        tls = credentials(config) if config.tls_certificate else None
        to_peers = peer_credentials(config) if config.tls_peer_ca else None
    except ConfigurationError as error:
        logger.error("cannot start", extra={"reason": str(error)})
        return MISCONFIGURED
    try:
        if not config.members:
            return asyncio.run(serve(config, *_shared_log(config), tls))
        member = GroupMember(config.group, config.node, config.group_members(), config.disk_file(), to_peers)
        try:
            return asyncio.run(serve(config, member.make_log, member.heartbeats, tls, member))
        finally:
            member.close()
    except TxrpcError as error:
        logger.error("cannot start", extra={"reason": str(error)})
        return LOG_CLOSED


def _shared_log(config: CoordinatorConfig) -> tuple[Callable[[], DecisionLog], Heartbeats]:
    """Return what makes an access to the log, and its heartbeats."""
    if is_etcd(config.log):
        from txrpc._etcd.heartbeats import EtcdHeartbeats
        from txrpc._etcd.log import EtcdLog

        return lambda: EtcdLog(config.log), EtcdHeartbeats(config.log, config.takeover_s)
    from txrpc._decision_log.heartbeats import SqlHeartbeats
    from txrpc._decision_log.sql import SqlLog

    return lambda: SqlLog(config.log), SqlHeartbeats(config.log)
