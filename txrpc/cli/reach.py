"""Where a coordinator is, and how to get there: the options that every command has that asks one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import grpc

__all__ = ["Reach", "reach_options"]


@dataclass(frozen=True, slots=True)
class Reach:
    """A coordinator's address, and the files for TLS; without a CA the channel is in the clear."""

    address: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def channel(self) -> grpc.Channel:
        """Open a channel; raises `click.ClickException` if a file cannot be read."""
        import grpc

        options = [("grpc.max_receive_message_length", -1)]
        if self.ca is None:
            return grpc.insecure_channel(self.address, options)
        ca, certificate, key = map(_read, (self.ca, self.certificate, self.key))
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(ca, key, certificate), options)


def _read(file: str | None) -> bytes | None:
    try:
        return Path(file).read_bytes() if file is not None else None
    except OSError as error:
        raise click.ClickException(f"cannot read {file}: {error.strerror}") from None


def reach_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give *command* the options, and call it with a `Reach` as its argument *reach*."""

    @functools.wraps(command)
    def call(
        address: str | None, tls_ca: str | None, tls_certificate: str | None, tls_key: str | None, **others: Any
    ) -> None:
        if (tls_certificate is None) != (tls_key is None):
            raise click.UsageError("--tls-certificate and --tls-key belong together")
        if tls_certificate is not None and tls_ca is None:
            raise click.UsageError("--tls-certificate needs --tls-ca, by which the coordinator is known")
        address = address or os.environ.get("TXRPC_COORDINATOR") or "127.0.0.1:7400"
        command(reach=Reach(address, tls_ca, tls_certificate, tls_key), **others)

    options = [
        click.option(
            "--coordinator", "address", metavar="HOST:PORT", help="Default: TXRPC_COORDINATOR, or 127.0.0.1:7400."
        ),
        click.option(
            "--tls-ca",
            metavar="FILE",
            envvar="TXRPC_TLS_CA",
            show_envvar=True,
            help="Use TLS; the coordinator's CA, as PEM.",
        ),
        click.option(
            "--tls-certificate",
            metavar="FILE",
            envvar="TXRPC_TLS_CERTIFICATE",
            show_envvar=True,
            help="One's own, if it asks for one.",
        ),
        click.option(
            "--tls-key", metavar="FILE", envvar="TXRPC_TLS_KEY", show_envvar=True, help="Of that certificate."
        ),
    ]
    for option in reversed(options):
        call = option(call)
    return call
