"""Where a log in etcd is: ``etcd://[USER:PASSWORD@]HOST:PORT,HOST:PORT,.../PREFIX``, with TLS ``etcds://``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

import grpc

from txrpc.errors import ConfigurationError

__all__ = ["EtcdUrl", "is_etcd", "parsed"]

_PREFIX: Final = "txrpc"
_PORT: Final = 2379
_FILES: Final = ("ca", "cert", "key")
_ENDPOINT: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_EXAMPLE: Final = "etcd://HOST:2379,HOST:2379,HOST:2379/txrpc"


@dataclass(frozen=True, slots=True)
class EtcdUrl:
    """A cluster, a part of its keys, and how to speak to it."""

    endpoints: tuple[str, ...]
    prefix: str
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    """With TLS: of ``ca`` (else the system's), and of ``cert`` and ``key``, which this program shows."""

    @property
    def location(self) -> str:
        """For people: no password in it."""
        return f"etcd{'s' if self.tls else ''}://{','.join(self.endpoints)}/{self.prefix}"

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None without TLS; raises `ConfigurationError` if a file cannot be read."""
        if not self.tls:
            return None
        ca, chain, key = (_read(name, self.files[name]) if name in self.files else None for name in _FILES)
        return grpc.ssl_channel_credentials(ca, key, chain)


def is_etcd(url: str) -> bool:
    """Return whether *url* means etcd, and no SQL database."""
    return url.startswith(("etcd:", "etcds:"))


def parsed(url: str) -> EtcdUrl:
    """*url* in parts; raises `ConfigurationError`, which shows no password."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, prefix = rest.partition("/")
    login, _, hosts = authority.rpartition("@")
    user, _, password = login.partition(":")
    prefix = prefix.strip("/") or _PREFIX
    if scheme not in ("etcd", "etcds") or not prefix.replace("/", "").isprintable():
        raise ConfigurationError(f"a log in etcd is {_EXAMPLE}, or etcds:// for TLS")
    return EtcdUrl(
        _endpoints(hosts), prefix, unquote(user), unquote(password), scheme == "etcds", _files(scheme == "etcds", query)
    )


def _endpoints(hosts: str) -> tuple[str, ...]:
    endpoints: list[str] = []
    for host in hosts.split(","):
        match = _ENDPOINT.fullmatch(host)
        if match is None or not 0 < int(match["port"] or _PORT) <= 65_535:
            raise ConfigurationError(f"{host!r} is no member of etcd: a log in etcd is {_EXAMPLE}")
        endpoint = f"{match['host']}:{int(match['port'] or _PORT)}"
        if endpoint in endpoints:
            raise ConfigurationError(f"the member {endpoint} of etcd is named twice")
        endpoints.append(endpoint)
    return tuple(endpoints)


def _files(tls: bool, query: str) -> dict[str, str]:
    files = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(files.keys() - set(_FILES))
    if unknown:
        raise ConfigurationError(f"a log in etcd has no setting {unknown[0]!r}: there are {', '.join(_FILES)}")
    if files and not tls:
        raise ConfigurationError(f"{', '.join(files)} belong to TLS: write etcds://")
    if ("cert" in files) != ("key" in files):
        raise ConfigurationError("cert and key of a log in etcd belong together")
    return files


def _read(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{name} of the log in etcd: cannot read {file}: {error.strerror}") from None
