"""Bytes that nobody meant, for some seconds a target, guided by what they reach; and that a mistake would be found."""

from __future__ import annotations

import base64
import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import core as stage
from tests.hostile.targets import TARGETS
from tests.proof import note_proof
from txrpc._protocol.coordinator.events import Logged

SECONDS = {"core": 12, "process_batch": 6}
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="no atheris for this Python or this machine"
)


@pytest.mark.proof
@needs_atheris
@pytest.mark.parametrize("target", TARGETS)
def test_rule_15_whatever_bytes_come(target: str, tmp_path: Path) -> None:
    seconds = SECONDS.get(target, 4)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=500", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-m", "tests.hostile.fuzz", target, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (runs,) = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    assert int(runs) > 100
    note_proof("fuzz", target=target, examples=int(runs), seconds=seconds)


@pytest.mark.parametrize("target", TARGETS)
def test_rule_15_random_bytes_without_any_help(target: str) -> None:
    dice = random.Random(target)
    for _ in range(2_000):
        TARGETS[target](dice.randbytes(dice.randint(0, 300)))


def test_a_branch_that_is_in_no_decision_rolls_back_beside_one_that_commits() -> None:
    """Found by the fuzzer, of its own watcher, which took that for two outcomes of one transaction (rule 8 wants it)."""
    found = (
        "yfPJNywA+sn6+vr62mYAWCXaB3BwcNra2tpmZmZm2traB38FBQUFBQW6+vr6+vr6JPr6+vr6ZADy+vpd+vp7e3t7FQAAEAB3ABDWARUKlA=="
    )
    stage.core(base64.b64decode(found))


def test_a_core_that_tells_a_commit_before_it_is_durable_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage._Stage, "answer", _forgetful)
    dice = random.Random(1)
    with pytest.raises(AssertionError, match="not in the log"):
        for _ in range(60_000):
            stage.core(dice.randbytes(400))


def _forgetful(self: stage._Stage) -> None:
    """A log that says that it has written, and has not."""
    for asked in [each for each in self.waiting if isinstance(each, tuple)]:
        self.waiting.remove(asked)
        self.step(Logged(tuple(decision.xid for decision in asked)))
