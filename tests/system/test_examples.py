"""The README's example and the examples' programs do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.readme import play
from tests.postgres import Server
from txrpc.testing.processes import Child, CoordinatorProcess, free_port

ROOT = Path(__file__).resolve().parents[2]


def money(server: Server, database: str, query: str) -> object:
    return server.execute(query, database)[0][0]


def test_the_readmes_example_runs_as_it_stands(servers: dict[str, Server], tmp_path: Path) -> None:
    """tests/install runs it from an installed wheel as well."""
    said = play(tmp_path, Path(sys.executable), servers, "psycopg", number=1)
    assert "NOT_FOUND" in said[-1]
    assert "bank-b has no account 'zoe'" in said[-1]


SETUP = {
    "orders": "SELECT 1",
    "stock": "INSERT INTO shelf VALUES ('tea', 10, 450), ('cup', 3, 1200)",
    "payments": "INSERT INTO purse VALUES ('ada', 5000)",
}


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.proof)])
def test_the_shop_sells_a_whole_cart_or_nothing(servers: dict[str, Server], tmp_path: Path, driver: str) -> None:
    """Three hops, in parallel calls: customer, orders, stock, payments."""
    server = servers["bank-a"]
    with CoordinatorProcess(tmp_path) as coordinator:
        services: list[Child] = []
        following = ""
        for role in ("payments", "stock", "orders"):
            server.create_database(f"shop{driver}{role}")
            port = free_port()
            command = [sys.executable, "-m", "examples.shop.services", role, "--listen", f"127.0.0.1:{port}"]
            command += ["--database", server.url(f"shop{driver}{role}", driver), "--coordinator", coordinator.address]
            command += ["--next", following] if following else []
            services.append(Child(command, name=role, output=tmp_path / f"{role}.log"))
            services[-1].start()
            services[-1].wait_for("serving")
            server.execute(SETUP[role], f"shop{driver}{role}")
            following = f"127.0.0.1:{port}"

        def buy(*cart: str) -> str:
            command = [sys.executable, "-m", "examples.shop.customer", "ada", *cart]
            command += ["--orders", following, "--coordinator", coordinator.address]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr + "".join(s.text() for s in services)
            return done.stdout

        try:
            paid, *lines = buy("tea:2", "cup:1").splitlines()
            assert paid == "ada has paid 21.00"
            assert sorted(lines) == ["  1 x cup", "  2 x tea"]
            assert re.search(r"^nothing was bought: cup is sold out", buy("tea:1", "cup:9"))
            assert re.search(r"^nothing was bought: .*ada cannot pay 3600 cents", buy("tea:8"))
            assert (
                money(server, f"shop{driver}stock", "SELECT string_agg(item || count, ' ' ORDER BY item) FROM shelf")
                == "cup2 tea8"
            )
            assert money(server, f"shop{driver}payments", "SELECT cents FROM purse") == 2900
            assert money(server, f"shop{driver}orders", "SELECT count(*) FROM order_line") == 2
            assert money(server, "postgres", "SELECT count(*) FROM pg_prepared_xacts WHERE database LIKE 'shop%'") == 0
            for service in services:
                assert service.terminate() == 0, service.text()
        finally:
            for service in services:
                service.kill()
    for role in SETUP:
        server.execute(f"DROP DATABASE shop{driver}{role} WITH (FORCE)")


def test_the_teller_program(servers: dict[str, Server], tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path) as coordinator:
        services, addresses = [], []
        for name, server in servers.items():
            addresses.append(f"127.0.0.1:{free_port()}")
            command = [sys.executable, "-m", "examples.bank.service", "--name", name, "--listen", addresses[-1]]
            command += ["--database", server.create_database(f"teller{name[-1]}"), "--coordinator", coordinator.address]
            services.append(Child([*command, "--accounts", "10"], name=name, output=tmp_path / f"{name}.log"))
        with services[0], services[1]:
            for service in services:
                service.wait_for("serving")
            command = [
                sys.executable,
                "-m",
                "examples.bank.teller",
                "--coordinator",
                coordinator.address,
                "--accounts",
                "10",
            ]
            command += ["--transfers", "40", "--banks", *addresses]
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
            assert done.returncode == 0, done.stderr
            assert re.search(r"\b40 committed", done.stdout)
            assert "all the money: 20,000.00 before, 20,000.00 after" in done.stdout
            for service in services:
                assert service.terminate() == 0
    for name, server in servers.items():
        server.execute(f"DROP DATABASE teller{name[-1]} WITH (FORCE)")


@pytest.mark.proof
@pytest.mark.parametrize("form", ["two-phase", "--group", "final-calls", "decides", "embedded", "files"])
def test_the_demonstration_proves_itself(form: str) -> None:
    how = [form] if form == "--group" else ["--form", form]
    command = [sys.executable, "-m", "examples.bank.demo", "--transfers", "150", "--threads", "4", *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kill -9") == 3
    assert done.stdout.count("yes") == 6
    assert "the proof" in done.stdout


@pytest.mark.proof
def test_without_postgresql_the_demonstration_takes_files(tmp_path: Path) -> None:
    """As on a machine for which there is no driver: its module cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'psycopg' else find(name, *more)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "examples.bank.demo", "--transfers", "50"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no driver of PostgreSQL here" in done.stdout
    assert "a SQLite file, a folder, and a program with a coordinator inside" in done.stdout
    refused = subprocess.run(
        [*command, "--form", "embedded"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert (refused.returncode, "pip install 'txrpc[postgresql]'" in refused.stderr) == (1, True)


@pytest.mark.proof
def test_the_example_of_testing_your_own_services_passes_as_a_user_would_run_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests")]
    done = subprocess.run(
        [*command, "examples/testing"], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
