"""What users install: the wheel, with each extra alone, in a new environment and outside the clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.install.environments import Environment, build_wheel, constraints_of_the_oldest
from tests.install.readme import play
from tests.postgres import Server

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {
    "txrpc.sql.resource_async": {"asyncio", "asyncpg", "aiosqlite", "aiomysql", "asyncmy"},
    "txrpc.testing.pytest_plugin": {"testing"},
}
"""Modules that cannot be imported without one of these extras.  Everything else can, always."""
DRIVERS = {"postgresql": "psycopg", "psycopg2": "psycopg2", "embedded-postgresql": "psycopg"}
"""The extras with which the README's example runs."""
EXTRAS = ["", "asyncio", "asyncpg", "embedded-postgresql", "postgresql", "psycopg2", "testing", "aiosqlite"]
EXTRAS += ["pymysql", "aiomysql", "asyncmy"]
OTHER_PYTHONS = ["3.12", "3.13", "3.14"]

IMPORTS = """
    import json, pkgutil, txrpc
    failed = {}
    names = [module.name for module in pkgutil.walk_packages(txrpc.__path__, "txrpc.") if "__main__" not in module.name]
    for name in ["txrpc", *names]:
        try:
            module = __import__(name, fromlist=["x"])
            for exported in getattr(module, "__all__", ()):
                getattr(module, exported)
        except ImportError as error:
            failed[name] = str(error)
    print(json.dumps([txrpc.__file__, len(names), failed]))
"""
LOCALLY = """
    import asyncio, sys
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine
    import txrpc.aio, txrpc.sql

    async def main():
        engine = create_async_engine(sys.argv[1])
        own = txrpc.sql.AsyncResourceManager("own", engine)
        manager = await txrpc.aio.connect("127.0.0.1:1", resources=[own], options=txrpc.SessionOptions(connect_timeout_s=0.1))
        async with txrpc.aio.transaction():
            async with own.connection() as connection:
                await connection.execute(sa.text("CREATE TABLE kept AS SELECT 7 AS n"))
        async with own.connection() as connection:
            print(await connection.scalar(sa.text("SELECT n FROM kept")))
        await manager.close()
        await engine.dispose()

    asyncio.run(main())
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_every_extra_is_tried() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == {"", *project["optional-dependencies"]} - {"dev"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_wheel_with_one_extra_imports_and_works(
    wheel: Path, servers: Mapping[str, Server], tmp_path: Path, extra: str
) -> None:
    environment = Environment.make(tmp_path / "venv", Path(sys.executable))
    driver = DRIVERS.get(extra)
    environment.install(f"{wheel}[{extra}]" if extra else str(wheel), *(["grpcio-tools"] if driver else []))
    where, count, failed = json.loads(environment.run(textwrap.dedent(IMPORTS)))
    assert str(tmp_path) in where
    assert count > 90
    unimportable = {name for name, extras in NEEDS.items() if extra not in extras}
    assert failed.keys() - {"txrpc.sql"} <= unimportable, failed
    if "txrpc.sql" in failed:
        assert extra not in NEEDS["txrpc.sql.resource_async"]
        assert "pip install 'sqlalchemy[asyncio]'" in failed["txrpc.sql"]
    assert "coordinator" in environment.command("txrpc", "--help")
    if driver:
        (tmp_path / "example").mkdir()
        play(tmp_path / "example", environment.python, servers, driver, 900 + EXTRAS.index(extra))
    if extra == "asyncpg":
        servers["bank-a"].create_database("locally")
        assert environment.run(textwrap.dedent(LOCALLY), servers["bank-a"].url("locally", "asyncpg")) == "7\n"
        servers["bank-a"].execute("DROP DATABASE locally WITH (FORCE)")
    if extra == "aiosqlite":
        assert environment.run(textwrap.dedent(LOCALLY), f"sqlite+aiosqlite:///{tmp_path}/own.db") == "7\n"


PART = [
    "tests/wire",
    "tests/rpc",
    "tests/runtime",
    "tests/log/test_contract.py",
    "tests/log/test_sql.py",
    "tests/coordinator",
    "tests/sql/test_verbs.py",
    "tests/sql/test_sessions.py",
    "tests/sql/test_aio.py",
    "tests/sql/test_sqlite.py",
    "tests/sql/test_sqlite_register.py",
    "tests/sql/mysql",
    "tests/test_errors.py",
]
"""What runs on the oldest versions: where txrpc meets gRPC, protobuf and SQLAlchemy."""
PART_OF_PYTHON = [
    "tests/wire",
    "tests/rpc",
    "tests/log/test_contract.py",
    "tests/sql/test_verbs.py",
    "tests/sql/test_aio.py",
    "tests/sql/test_sqlite.py",
    "tests/sql/test_sqlite_register.py",
    "tests/sql/mysql/test_connections.py",
]
"""What runs on other Pythons, with the newest versions of everything."""


def _marks(which: str) -> list[pytest.MarkDecorator]:
    """CI has the oldest and the newest; what is between them is for `make proof`."""
    return [pytest.mark.long] if which == "3.12" else []


@pytest.mark.parametrize("which", [pytest.param(which, marks=_marks(which)) for which in ("oldest", *OTHER_PYTHONS)])
def test_a_part_of_the_tests_on_other_versions(tmp_path: Path, which: str) -> None:
    """The oldest of everything that pyproject.toml allows; and the newest on the other Pythons that this machine has."""
    python = Path(sys.executable) if which == "oldest" else Environment.other_python(which)
    if python is None:
        pytest.skip(f"no Python {which} on this machine")
    environment = Environment.make(tmp_path / "venv", python)
    extras = "aiosqlite,asyncpg,psycopg2,postgresql,pymysql,aiomysql,asyncmy,embedded-postgresql,testing"
    wanted = [
        f"{ROOT}[{extras}]",
        "pytest-asyncio>=1.0",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "pyyaml",
        "trustme",
    ]
    wanted += ["opentelemetry-instrumentation-grpc>=0.50b0", "opentelemetry-sdk>=1.29", "py-grpc-prometheus>=0.8"]
    if which == "oldest":
        constraints = tmp_path / "constraints.txt"
        constraints.write_text(constraints_of_the_oldest(ROOT / "pyproject.toml"))
        wanted += ["--constraint", str(constraints)]
    environment.install("--editable", *wanted)
    command = ["-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not proof"]
    command += PART if which == "oldest" else PART_OF_PYTHON
    done = subprocess.run(
        [str(environment.python), *command, f"--basetemp={tmp_path / 'tests'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{environment.versions()}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    print(environment.versions())
