"""The coordinator's configuration: one frozen value, validated once.

Sources, the first that says something wins: command-line flags, ``TXRPC_*`` environment variables, a TOML file, defaults.
Every field of `CoordinatorConfig` has all four: ``max_branches`` is ``--max-branches``, ``TXRPC_MAX_BRANCHES`` and the TOML
key ``max_branches``.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txrpc._etcd.url import is_etcd
from txrpc._group.members import founders
from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.quorum.views import View
from txrpc.errors import ConfigurationError, InvalidName
from txrpc.ids import GROUP_MAX, NODE_MAX, check_name

__all__ = ["FIELDS", "CoordinatorConfig", "load"]

PREFIX = "TXRPC_"


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """What `txrpc coordinator` is told."""

    listen: str = _field("127.0.0.1:7400", "HOST:PORT to listen on; port 0 lets the system choose")
    tls_certificate: str = _field("", "file with this coordinator's certificate chain, as PEM: with it, TLS only")
    tls_key: str = _field("", "file with the private key of that certificate, as PEM")
    tls_client_ca: str = _field(
        "", "file with the CA of the processes' certificates, as PEM: with it, who has none is refused"
    )
    log: str = _field(
        "sqlite:///txrpc.db",
        "URL of the log: sqlite:///FILE, postgresql+psycopg://..., mariadb+pymysql://... or etcd://HOST:PORT,HOST:PORT,...",
    )
    members: str = _field(
        "", "the group that keeps its decisions on its own disks, this node included: c1=HOST:PORT,c2=HOST:PORT,..."
    )
    read_quorum: int = _field(0, "members of the group that must answer before a log is opened; 0: a majority")
    write_quorum: int = _field(0, "members of the group that must have a decision on their disks; 0: a majority")
    tls_peer_ca: str = _field("", "file with the CA of the other members' certificates, as PEM")
    node: str = _field("c1", "this coordinator's name: the same after every restart, unique in its group")
    group: str = _field("default", "the coordinator group's name, the same in every process")
    retention_s: float = _field(86_400.0, "seconds to keep finished decisions, for clients that ask again")
    shutdown_grace_s: float = _field(10.0, "seconds for what is being decided when told to stop")
    in_doubt_warn_s: float = _field(10.0, "seconds after which a branch in doubt is logged, with the reason")
    ack_wait_s: float = _field(5.0, "seconds that a commit waits for acknowledgements after the decision")
    recovery_wait_s: float = _field(
        2.0, "seconds after the start before anything is presumed about earlier epochs; half of it after a takeover"
    )
    takeover_s: float = _field(
        1.0,
        "seconds of silence (1 or more) after which a coordinator on the same log is taken over; 0: take no part in that",
    )
    max_timeout_s: float = _field(600.0, "longest timeout of a transaction, in seconds")
    max_transactions: int = _field(10_000, "transactions that may be committing at one time")
    max_branches: int = _field(256, "branches of one transaction")
    max_sessions: int = _field(10_000, "connected processes")
    max_message_bytes: int = _field(4 * 1024 * 1024, "size of one batch on a session, in bytes")
    max_remembered: int = _field(1_000_000, "ended transactions kept in memory to recognise late requests")
    keepalive_s: float = _field(10.0, "seconds of silence after which a session is probed")
    keepalive_timeout_s: float = _field(5.0, "seconds without an answer to a probe after which a session is given up")
    log_level: str = _field("info", "debug, info, warning or error")
    log_format: str = _field("logfmt", "logfmt (key=value) or json")

    def __post_init__(self) -> None:
        self.address()
        _name("node", self.node, NODE_MAX)
        _name("group", self.group, GROUP_MAX)
        for option, (least, most) in _RANGES.items():
            _within(option, getattr(self, option), least, most)
        if 0 < self.takeover_s < _TAKEOVER_MIN_S:
            raise ConfigurationError(
                f"takeover_s is {self.takeover_s}; it must be {_TAKEOVER_MIN_S} at least, which is four heartbeats, or 0"
            )
        _one_of("log_level", self.log_level, ("debug", "info", "warning", "error"))
        _one_of("log_format", self.log_format, ("logfmt", "json"))
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigurationError("tls_certificate and tls_key belong together")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigurationError(
                "tls_client_ca needs tls_certificate and tls_key: a coordinator that shows none asks for none"
            )
        if self.members:
            self._check_group()
        elif self.read_quorum or self.write_quorum or self.tls_peer_ca:
            raise ConfigurationError("read_quorum, write_quorum and tls_peer_ca belong to a group: name its members")
        self.limits()

    def _check_group(self) -> None:
        members = self.group_members()
        if self.node not in members.names:
            raise ConfigurationError(
                f"the members are {', '.join(members.names)}; this node, {self.node!r}, is none of them"
            )
        self.disk_file()
        if not self.takeover_s:
            raise ConfigurationError("the members of a group take each other over: takeover_s may not be 0")
        if bool(self.tls_certificate) != bool(self.tls_peer_ca):
            raise ConfigurationError(
                "a group with TLS needs tls_certificate, tls_key and tls_peer_ca, and else none of them"
            )

    def group_members(self) -> View:
        """`members` and the quorums."""
        return founders(self.members, self.read_quorum, self.write_quorum)

    def disk_file(self) -> str:
        """The file that is this member's disk."""
        from txrpc._decision_log.database import checked_url  # not for those who only want to see the options

        url = None if is_etcd(self.log) else checked_url(self.log)
        if url is None or url.get_backend_name() != "sqlite" or not url.database:
            raise ConfigurationError("each member of a group has a disk of its own: log is sqlite:///FILE")
        return url.database

    def address(self) -> tuple[str, int]:
        """`listen` as host and port."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65_535:
            raise ConfigurationError(f"listen is HOST:PORT, not {self.listen!r}")
        return host, int(port)

    def limits(self) -> Limits:
        """The part that the protocol's core sees."""
        return Limits(
            max_transactions=self.max_transactions,
            max_branches=self.max_branches,
            max_sessions=self.max_sessions,
            max_message_bytes=self.max_message_bytes,
            max_timeout_ms=int(self.max_timeout_s * 1000),
            max_remembered=self.max_remembered,
            ack_wait_ms=int(self.ack_wait_s * 1000),
            recovery_wait_ms=int(self.recovery_wait_s * 1000),
        )


_DAY_S = 86_400
_TAKEOVER_MIN_S = 1.0
_RANGES: dict[str, tuple[float, float]] = {
    "retention_s": (0, 3_660 * _DAY_S),
    "shutdown_grace_s": (0, _DAY_S),
    "in_doubt_warn_s": (0, _DAY_S),
    "ack_wait_s": (0.001, _DAY_S),
    "recovery_wait_s": (0, _DAY_S),
    "takeover_s": (0, _DAY_S),
    "max_timeout_s": (0.001, _DAY_S),
    "keepalive_s": (0.001, _DAY_S),
    "keepalive_timeout_s": (0.001, _DAY_S),
    "read_quorum": (0, 1_000),
    "write_quorum": (0, 1_000),
    "max_transactions": (1, 10_000_000),
    "max_branches": (1, 10_000),
    "max_sessions": (1, 1_000_000),
    "max_message_bytes": (16 * 1024, 1024 * 1024 * 1024),
    "max_remembered": (1, 1_000_000_000),
}
"""Least and most of every number: what the wire's fields hold, and what makes sense."""

FIELDS = {f.name: f for f in dataclasses.fields(CoordinatorConfig)}


def load(flags: Mapping[str, Any], environment: Mapping[str, str], file: str | None) -> CoordinatorConfig:
    """Put the sources together.  *flags* has only what was given.  Raises `ConfigurationError` naming source, key and value."""
    values: dict[str, Any] = {}
    if file is not None:
        for key, value in _read(file).items():
            if key not in FIELDS:
                raise ConfigurationError(f"{file}: there is no option {key!r}; there are {', '.join(sorted(FIELDS))}")
            values[key] = _convert(f"{file}: {key}", key, value)
    for key in FIELDS:
        text = environment.get(PREFIX + key.upper())
        if text is not None:
            values[key] = _convert(PREFIX + key.upper(), key, text)
    for key, value in flags.items():
        values[key] = _convert("--" + key.replace("_", "-"), key, value)
    return CoordinatorConfig(**values)


def _read(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration {file} is not TOML: {error}") from None


def _convert(source: str, key: str, value: Any) -> Any:
    wanted: Any = type(FIELDS[key].default)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigurationError(f"{source}: {value!r} is not {_ARTICLE[wanted]}")
    if wanted is str and not isinstance(value, str):
        raise ConfigurationError(f"{source}: {value!r} is not {_ARTICLE[wanted]}")
    try:
        if wanted is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return wanted(value)
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{source}: {value!r} is not {_ARTICLE[wanted]}") from None


_ARTICLE: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text"}


def _name(option: str, value: str, longest: int) -> None:
    try:
        check_name(option, value, longest)
    except InvalidName as error:
        raise ConfigurationError(str(error)) from None


def _within(option: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN is not, either
        raise ConfigurationError(f"{option} is {value}; it must be from {least:,} to {most:,}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
