"""The coordinator's TLS: files to credentials, checked before gRPC sees them, because it says little about what is wrong."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from txrpc._coordinator.config import CoordinatorConfig
from txrpc.errors import ConfigurationError

__all__ = ["credentials", "peer_credentials"]


def credentials(config: CoordinatorConfig) -> grpc.ServerCredentials:
    """Return what the coordinator shows, and what it asks for; raises `ConfigurationError`, naming the option and the file."""
    chain, key = _read("tls_certificate", config.tls_certificate), _read("tls_key", config.tls_key)
    ca = _read_ca("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key} are not a certificate with its key: {error}"
        ) from None
    return grpc.ssl_server_credentials([(key, chain)], ca, require_client_auth=ca is not None)


def peer_credentials(config: CoordinatorConfig) -> grpc.ChannelCredentials:
    """Return what this member shows to the others, and by what it knows them; raises `ConfigurationError`."""
    chain, key = _read("tls_certificate", config.tls_certificate), _read("tls_key", config.tls_key)
    return grpc.ssl_channel_credentials(_read_ca("tls_peer_ca", config.tls_peer_ca), key, chain)


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted; give one that is not, readable by this user alone")


def _read_ca(option: str, file: str) -> bytes:
    ca = _read(option, file)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_verify_locations(file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(f"{option} {file} is not a certificate: {error}") from None
    return ca


def _read(option: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{option}: cannot read {file}: {error.strerror}") from None
