"""The environment variables that a process with transactions reads.  (The coordinator's are in `txrpc._coordinator.config`.)"""

from __future__ import annotations

import os

from txrpc.errors import ConfigurationError

__all__ = ["coordinator_address", "failpoints"]


def coordinator_address(given: str | None) -> str:
    """*given*, or else ``TXRPC_COORDINATOR``; raises `ConfigurationError` if there is neither, or it is not ``host:port``."""
    address = given or os.environ.get("TXRPC_COORDINATOR", "")
    if not address:
        raise ConfigurationError("no coordinator: pass connect('host:port') or set TXRPC_COORDINATOR")
    if "://" in address:
        raise ConfigurationError(f"the coordinator's address is 'host:port', without a scheme, not {address!r}")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"the coordinator's address is 'host:port', not {address!r}")
    return address


def failpoints() -> str:
    """``TXRPC_FAILPOINTS``, for tests: see `txrpc._failpoints`."""
    return os.environ.get("TXRPC_FAILPOINTS", "")
