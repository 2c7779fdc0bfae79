"""Real servers: MariaDB, from Debian's packages mariadb-server-core and mariadb-client-core, and MySQL (scripts/mysql.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pymysql
import pytest
from sqlalchemy.engine import URL

from txrpc.testing.processes import Child, free_port

__all__ = ["BOTH", "MariaServer", "MySqlServer", "needs_mariadb", "needs_mysql"]

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
_PROGRAM = shutil.which("mariadbd", path=_PATH)
_MYSQL = Path(__file__).resolve().parent.parent / "build" / "mysql" / "mysqld"

needs_mariadb = pytest.mark.skipif(
    _PROGRAM is None or shutil.which("my_print_defaults") is None,
    reason="no MariaDB here: apt-get install mariadb-server-core mariadb-client-core",
)
needs_mysql = pytest.mark.skipif(not _MYSQL.exists(), reason="no MySQL here: run scripts/mysql.py")


class MariaServer(Child):
    """A private server on a port of 127.0.0.1, which may be killed, frozen and started again; with a superuser, root."""

    product = "mariadb"
    privileges: tuple[str, ...] = ()
    """What a user needs beside the rights to his tables."""

    def __init__(self, **settings: object) -> None:
        """*settings*: of the server, with _ for -."""
        self.folder = Path(tempfile.mkdtemp(prefix=f"txrpc-{self.product}-"))
        self.port = free_port()
        (self.folder / "tmp").mkdir()
        data = [f"--datadir={self.folder / 'data'}", f"--tmpdir={self.folder / 'tmp'}"]
        data += ["--user=root"] if os.geteuid() == 0 else []
        program, install = self._programs()
        made = subprocess.run([*install, *data], capture_output=True, text=True, timeout=120, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
        options = {"bind-address": "127.0.0.1", "port": self.port, "socket": self.folder / "socket", **settings}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        super().__init__(
            [*program, *data, *arguments],
            name=self.product,
            output=self.folder / f"{self.product}.log",
            ready="ready for connections",
        )

    def _programs(self) -> tuple[list[str], list[str]]:
        """What runs, and what makes its data before."""
        assert _PROGRAM is not None
        install = ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]
        return [_PROGRAM, "--no-defaults"], install

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.resume()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str, driver: str = "pymysql", user: str = "root") -> str:
        """For `sqlalchemy.create_engine`."""
        return URL.create(
            f"{self.product}+{driver}", user, host="127.0.0.1", port=self.port, database=database
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
        return len(self.branches())

    @contextmanager
    def another_server(self) -> Iterator[None]:
        """It has another identity meanwhile, as a replica has which takes the primary's place."""
        self.execute("SET GLOBAL server_id = 2")
        try:
            yield
        finally:
            self.execute("SET GLOBAL server_id = 1")

    def branches(self) -> list[tuple[int, bytes, bytes]]:
        """Those that are prepared: format, and both parts of the name."""
        found = self.execute("XA RECOVER")
        return [(form, data[:length], data[length:]) for form, length, _, data in found]


class MySqlServer(MariaServer):
    """The same with MySQL."""

    product = "mysql"
    privileges = ("XA_RECOVER_ADMIN",)

    def _programs(self) -> tuple[list[str], list[str]]:
        common = [str(_MYSQL), "--no-defaults", f"--basedir={_MYSQL.parent / 'root' / 'usr'}", "--secure-file-priv="]
        return [*common, "--mysqlx=OFF"], [*common, "--initialize-insecure"]

    @contextmanager
    def another_server(self) -> Iterator[None]:
        self.kill()
        identity = self.folder / "data" / "auto.cnf"
        identity.write_text(f"[auto]\nserver-uuid={uuid.uuid4()}\n")
        self.start()
        yield

    def branches(self) -> list[tuple[int, bytes, bytes]]:
        found = self.execute("XA RECOVER CONVERT XID")
        whole = [(form, length, bytes.fromhex(data.removeprefix("0x"))) for form, length, _, data in found]
        return [(form, data[:length], data[length:]) for form, length, data in whole]


BOTH = [
    pytest.param(MariaServer, id="MariaDB", marks=needs_mariadb),
    pytest.param(MySqlServer, id="MySQL", marks=[needs_mysql, pytest.mark.proof]),
]
"""Parameters of a fixture: MariaDB, and in the deeper proofs MySQL."""
