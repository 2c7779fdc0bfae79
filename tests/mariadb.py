"""A real MariaDB server, from Debian's packages mariadb-server-core and mariadb-client-core."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pymysql
import pytest
from sqlalchemy.engine import URL

from txrpc.testing.processes import Child, free_port

__all__ = ["MariaServer", "needs_mariadb"]

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
_PROGRAM = shutil.which("mariadbd", path=_PATH)

needs_mariadb = pytest.mark.skipif(
    _PROGRAM is None or shutil.which("my_print_defaults") is None,
    reason="no MariaDB here: apt-get install mariadb-server-core mariadb-client-core",
)


class MariaServer(Child):
    """A private server on a port of 127.0.0.1, which may be killed, frozen and started again; with a superuser, root."""

    def __init__(self, **settings: object) -> None:
        """*settings*: of the server, with _ for -."""
        assert _PROGRAM is not None
        self.folder = Path(tempfile.mkdtemp(prefix="txrpc-mariadb-"))
        self.port = free_port()
        (self.folder / "tmp").mkdir()
        data = ["--no-defaults", f"--datadir={self.folder / 'data'}", f"--tmpdir={self.folder / 'tmp'}"]
        user = ["--user=root"] if os.geteuid() == 0 else []
        made = subprocess.run(
            ["mariadb-install-db", *data, *user, "--auth-root-authentication-method=normal", "--skip-test-db"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        options = {"bind-address": "127.0.0.1", "port": self.port, "socket": self.folder / "socket", **settings}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        super().__init__(
            [_PROGRAM, *data, *user, *arguments],
            name="mariadb",
            output=self.folder / "mariadb.log",
            ready="ready for connections",
        )

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.resume()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str, driver: str = "pymysql", user: str = "root") -> str:
        """For `sqlalchemy.create_engine`."""
        return URL.create(
            f"mariadb+{driver}", user, host="127.0.0.1", port=self.port, database=database
        ).render_as_string()

    def create_database(self, name: str) -> str:
        """Make it, new and empty, and return its URL."""
        self.execute(f"DROP DATABASE IF EXISTS {name}")
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, sql: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Execute *sql* on a connection of its own, in AUTOCOMMIT."""
        connection = pymysql.connect(
            host="127.0.0.1", port=self.port, user="root", database=database, autocommit=True, connect_timeout=30
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def prepared(self) -> int:
        """How many branches are prepared."""
        return len(self.execute("XA RECOVER"))
