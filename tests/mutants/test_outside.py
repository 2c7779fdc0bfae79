"""Every mistake in `outside` is noticed by tests that contributors run all day."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mariadb import needs_mariadb
from tests.mutants.outside import MUTANTS
from tests.mutation import MUTANT
from tests.proof import note_proof

ROOT = Path(__file__).resolve().parents[2]


DEAR = (
    "a greater position is forgotten",
    "calls in flight are left to their deadline",
    "a fan-out in a service is left to its deadline",
    "a log that has lost decisions goes on deciding",
    "finishing waits behind PREPARE",
    "a frozen coordinator keeps MariaDB's log",
    "a connection is kept although the resource was closed",
)
"""Those that are noticed only after a while."""
_SLOW = ("tests/system", "tests/sql", "tests/log/test_membership.py", "tests/log/test_etcd.py")


def _marks(name: str, tests: str) -> list[pytest.MarkDecorator]:
    """What starts processes or a database, or waits for a thread, takes its time: in CI."""
    starts_mariadb = "mysql" in tests or "mariadb" in tests
    marks = [needs_mariadb] if starts_mariadb else []
    if name in DEAR:
        return [*marks, pytest.mark.proof, pytest.mark.long]
    return [*marks, pytest.mark.proof] if starts_mariadb or tests.startswith(_SLOW) else []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_marks(name, tests)) for name, (_, tests) in MUTANTS.items()]
)
def test_the_tests_notice_that(name: str, tmp_path: Path) -> None:
    change, tests = MUTANTS[name]
    # pytest rewrites the assertions of packages that have plugins, from what is on the disk: not here.
    options = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not proof"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'tests'}", "--timeout=100", *_split(tests)],
        cwd=ROOT,
        env={**os.environ, MUTANT: name, "PYTHONPATH": f"{Path(__file__).parent / 'site'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1, f"not noticed: {change}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert "does not fit its module any more" not in done.stdout + done.stderr
    note_proof("mutant outside", name=name, module=change.module)


def _split(tests: str) -> list[str]:
    path, _, words = tests.partition(" -k ")
    return [path, "-k", words] if words else [path]


def test_every_mistake_still_fits_its_module() -> None:
    """Those that are noticed only after a while do not run all day: a text that has moved on is seen here."""
    stale = [
        name
        for name, (change, _) in MUTANTS.items()
        if (ROOT / _source_of(change.module)).read_text().count(change.old) != 1
    ]
    assert not stale


def _source_of(module: str) -> Path:
    path = Path(*module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


def test_there_are_mistakes_in_every_package() -> None:
    packages = {change.module.split(".")[1] for change, _ in MUTANTS.values()}
    assert packages == {
        "sql",
        "_decision_log",
        "_embedded_session",
        "_etcd",
        "_sqlstate",
        "_group",
        "_client",
        "_grpc",
        "_coordinator",
    }
    assert len(MUTANTS) >= 10
