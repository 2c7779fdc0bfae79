"""The environment variables that a process with transactions reads.  (The coordinator's are in `txrpc._coordinator.config`.)"""

from __future__ import annotations

import os

from txrpc.errors import ConfigurationError

__all__ = ["coordinator_addresses", "failpoints"]


def coordinator_addresses(given: str | None) -> list[str]:
    """*given*, or else ``TXRPC_COORDINATOR``, one address or several with commas between them.

    Raises `ConfigurationError` if there is none, or one is not ``host:port``, or is there twice.
    """
    addresses = [each.strip() for each in (given or os.environ.get("TXRPC_COORDINATOR", "")).split(",")]
    if addresses == [""]:
        raise ConfigurationError("no coordinator: pass connect('host:port') or set TXRPC_COORDINATOR")
    for address in addresses:
        if "://" in address:
            raise ConfigurationError(f"the coordinator's address is 'host:port', without a scheme, not {address!r}")
        host, colon, port = address.rpartition(":")
        if not colon or not host or set(host) & set(" ;/") or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigurationError(f"the coordinator's address is 'host:port', not {address!r}")
        if addresses.count(address) > 1:
            raise ConfigurationError(f"the coordinator's address {address!r} is named twice")
    return addresses


def failpoints() -> str:
    """``TXRPC_FAILPOINTS``, for tests: see `txrpc._failpoints`."""
    return os.environ.get("TXRPC_FAILPOINTS", "")
