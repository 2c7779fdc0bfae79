"""The benchmarks run, so that they still do when they are needed; what they measure is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scale import bytes_of_an_open_transaction


@pytest.mark.proof
@pytest.mark.long
def test_the_benchmarks_of_txrpc_run_in_both_styles(tmp_path: Path) -> None:
    forms = ["two", "one", "local", "textbook", "by-hand"]
    arguments = ["--clients", "2", "--seconds", "0.5", "--rounds", "1", "--into", str(tmp_path), "--forms", *forms]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {(run["form"], run["style"]) for run in runs} >= {
        *((form, "sync") for form in forms),
        *((form, "asyncio") for form in forms[:3]),
    }
    assert all(run["rate"] > 0 and run["p99_ms"] >= run["p50_ms"] > 0 for run in runs)


def test_an_open_transaction_takes_two_kibibytes_at_most_in_a_coordinators_memory() -> None:
    assert bytes_of_an_open_transaction(500) < 2_048


@pytest.mark.proof
@pytest.mark.long
def test_the_measurements_of_scale_run() -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--of", "memory", "branches"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 branches" in done.stdout
