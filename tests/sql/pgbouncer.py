"""A real PgBouncer before a database, in any of its modes."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from txrpc.testing.processes import free_port

__all__ = ["PgBouncer", "installed"]

_SETTINGS = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 20
logfile = {folder}/log
"""


def installed() -> str | None:
    """The program, if this machine has it."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class PgBouncer:
    """One that pools by *mode*: session, transaction or statement.  It refuses to run as root, so there it is nobody."""

    def __init__(self, url: str, mode: str) -> None:
        self._target, self._mode = sa.make_url(url), mode
        self._folder = Path(tempfile.mkdtemp(prefix="txrpc-pgbouncer-"))
        self._port = free_port()

    def url(self, driver: str, **query: str) -> sa.URL:
        """The same database through it."""
        through = self._target.set(host="127.0.0.1", port=self._port, drivername=f"postgresql+{driver}")
        return through.update_query_dict(query)

    def __enter__(self) -> Self:
        target = self._target
        settings = _SETTINGS.format(
            host=target.host,
            port=target.port,
            user=target.username,
            listen=self._port,
            mode=self._mode,
            folder=self._folder,
        )
        (self._folder / "ini").write_text(settings)
        user = None
        if os.getuid() == 0:
            user = "nobody"
            os.chown(self._folder, pwd.getpwnam(user).pw_uid, -1)
        command = [installed() or "pgbouncer", "-q", str(self._folder / "ini")]
        self._process = subprocess.Popen(
            command, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return self
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < until, self._log()
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _log(self) -> str:
        with suppress(OSError):
            return (self._folder / "log").read_text()
        return "it wrote no log"
