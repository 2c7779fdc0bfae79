"""Every failpoint x kill, freeze, error, delay x which process, on real processes and PostgreSQL; all in one world, in a row.

After each cell: somebody really came to the point; both banks agree; what the client was told is true; nothing is prepared, no
locks are left, the coordinator has nothing open or in doubt; and money appears and disappears only by what committed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

import txrpc
from tests.postgres import Server
from tests.proof import note_proof
from tests.system import scenarios
from tests.system.cells import ALL_DAY, BANKS, CELLS, HERE, PROCESSES, SCENARIOS, Cell
from tests.system.world import START, World
from tests.waiting import eventually
from txrpc.ids import Xid
from txrpc.testing.processes import Child

_REFUSES = f"""
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'refused'; END$$;
    CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.name = '{scenarios.REFUSED}') EXECUTE FUNCTION refuse();
    CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END$$;
    CREATE CONSTRAINT TRIGGER linger AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.name = '{scenarios.SLOW}') EXECUTE FUNCTION linger()
"""


class Nurse:
    """Starts again what has died, and wakes what is frozen a second after it froze."""

    def __init__(self, patients: list[Child]) -> None:
        self._patients = patients
        self._arm_at_start: dict[str, str] = {}
        self._asleep = {child.name: _freezes(child) for child in patients}
        self.helped = Counter[str]()
        """How often each was started again or woken."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def arm_at_start(self, process: str, points: str) -> None:
        """What *process* is to have armed when it is started again for the next time."""
        self._arm_at_start[process] = points

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for patient in self._patients:
                if not patient.running:
                    patient.arm(self._arm_at_start.pop(patient.name, ""))
                    with suppress(RuntimeError):  # it may die of a point while it starts
                        patient.start()
                    self.helped[patient.name] += 1
                elif (freezes := _freezes(patient)) > self._asleep[patient.name]:
                    self._asleep[patient.name] = freezes
                    time.sleep(1)
                    patient.resume()
                    self.helped[patient.name] += 1


def _helps_needed(cell: Cell) -> int:
    """How often the cell's process must be started again or woken: it does not do that in the same moment as it writes why."""
    if cell.process == "client":
        return 0
    before = sum(process in (cell.process, "{victim}") for process, _ in cell.scenario.before)
    if cell.scenario.armed_when == "starts" and not cell.scenario.before:
        before = 1
    return before + (cell.action in ("kill", "stop"))


def _freezes(child: Child) -> int:
    return child.output.read_text().count(": stop\n")


class Ward:
    """The world that all cells share, and a client in it."""

    def __init__(self, folder: Path, servers: dict[str, Server], number: int) -> None:
        self.world = World(folder, servers, number, ["--ack-wait-s", "2", "--max-timeout-s", "60"])
        self.world.start()
        for bank, server in servers.items():
            server.execute(_REFUSES, self.world.databases[bank])
        self.manager = txrpc.connect(self.world.coordinator.address, process="ward")
        self.children = {child.name: child for child in (self.world.coordinator, *self.world.services.values())}
        self.addresses = [service.address for service in self.world.services.values()]
        self.broken = False
        self.single: set[str] = set()
        """Transactions with one branch."""
        self.unknown: set[str] = set()
        """Transactions about which nobody can know more."""

    def close(self) -> None:
        self.manager.close()
        self.world.stop()

    # ---------------------------------------------------------------------------------------------------- one cell

    def play(self, cell: Cell) -> tuple[str, str]:
        """The transaction's XID and what its client was told."""
        scenario = cell.scenario
        eventually(
            lambda: self.transfers() == "committed", 30, self.world.evidence
        )  # what the last cell broke has come back
        started = {name: child.output.stat().st_size for name, child in self.children.items()}
        with Nurse(list(self.children.values())) as nurse:
            for process, point in scenario.before:
                name = process.format(victim=cell.process)
                if scenario.armed_when == "starts" and name == cell.process:
                    nurse.arm_at_start(name, f"{cell.point}={cell.action}")
                self.children[name].arm(f"{point}=kill")
            if cell.process == "client":
                xid, told, said = self._elsewhere(cell)
            else:
                if scenario.armed_when == "runs":
                    self._arm(cell)
                elif not scenario.before:
                    nurse.arm_at_start(cell.process, f"{cell.point}={cell.action}")
                    self.children[cell.process].kill()
                xid, told = self._here(cell)
                said = ""
            hit = f"failpoint {cell.point}: {cell.action.partition(':')[0]}"

            def was_hit() -> bool:
                if cell.process == "client":
                    return hit in said
                with self.children[cell.process].output.open() as output:
                    output.seek(started[cell.process])
                    return hit in output.read()

            if scenario.name == "the coordinator shuts down":
                self._shut_down_until(was_hit, cell)
            helps = _helps_needed(cell)
            eventually(was_hit, 20, lambda: f"nobody came to {cell.point}; told {told}\n{self.world.evidence()}")
            eventually(lambda: nurse.helped[cell.process] >= helps, 30, self.world.evidence)
            if told == "unknown" and scenario.name.startswith("one "):
                # Its process died in a commit in one phase, and nobody else knows the database's transaction id.  The coordinator
                # says so, and waits for the truth for as long as it can be asked about it.
                self.unknown.add(xid)
            self._recovered()
        return xid, told

    def transfers(self) -> str:
        """Try; how it ended."""
        return scenarios.carry_out("transfer", "", self.addresses, timeout_s=8)[1]

    def _arm(self, cell: Cell) -> None:
        others = [f"{point}=kill" for process, point in cell.scenario.before if process == cell.process]
        others += [f"{cell.scenario.fails}=error"] if cell.scenario.fails else []
        self.children[cell.process].arm(",".join([*others, f"{cell.point}={cell.action}"]))

    def _here(self, cell: Cell) -> tuple[str, str]:
        if cell.scenario.name == "the coordinator shuts down":
            with suppress(Exception):
                self.world.coordinator.terminate(10)
        if cell.scenario.name == "a client connects":
            with txrpc.connect(self.world.coordinator.address, process="another"):
                pass
        return scenarios.carry_out(cell.scenario.name, cell.process, self.addresses, timeout_s=8)

    def _shut_down_until(self, was_hit: Callable[[], bool], cell: Cell) -> None:
        """Shut the coordinator down again: a process that hears goodbye may close its session before the point is reached."""
        for _ in range(20):
            if was_hit():
                return
            eventually(lambda: self._sessions() == 3, evidence=self.world.evidence)
            self._arm(cell)
            with suppress(Exception):
                self.world.coordinator.terminate(10)

    def _sessions(self) -> int:
        with suppress(Exception):
            return len(self.world.status()["sessions"])
        return 0

    def _elsewhere(self, cell: Cell) -> tuple[str, str, str]:
        arguments = [self.world.coordinator.address, cell.scenario.name, cell.process, *self.addresses]
        client = Child(
            [sys.executable, "-m", "tests.system.scenarios", *arguments],
            name="client",
            output=self.world.folder / "client.log",
        )
        client.arm(f"{cell.point}={cell.action}")
        with client:
            client.wait(40)
            return *scenarios.what_it_was_told(client.text()), client.text()

    def _recovered(self) -> None:
        """Everybody runs, is at rest, and nobody's work is left."""
        eventually(lambda: all(child.running for child in self.children.values()), 30, self.world.evidence)
        self.world.at_rest()

        def nothing_open() -> object:
            with suppress(Exception):
                status = self.world.status()
                return not {row["xid"] for row in status["transactions"]} - self.unknown
            return False

        eventually(nothing_open, 30, self.world.evidence)

    # ------------------------------------------------------------------------------------------------------ the truth

    def check(self, cell: Cell, xid: str, told: str) -> str:
        """Agreement, honesty, conservation; returns how the transaction ended."""
        journals = self.world.journals()
        wrote = [xid in journal for journal in journals]
        if cell.scenario.name.startswith("one "):
            ended = "committed" if any(wrote) else "aborted"
        else:
            assert wrote[0] == wrote[1], self.world.evidence()
            assert journals[0].keys() - self.single == journals[1].keys() - self.single
            ended = "committed" if wrote[0] else "aborted"
        if told in ("committed", "aborted"):
            assert told == ended, self.world.evidence()
        if cell.scenario.name == "refused elsewhere" or cell.scenario.name == "give up":
            assert ended == "aborted"
        self._ask(xid, ended)
        for journal, (sum_of_accounts,) in zip(journals, self._sums(), strict=True):
            assert sum_of_accounts == 20 * START + sum(journal.values())
        return ended

    def _sums(self) -> list[tuple[int]]:
        return [(int(rows[0][0]),) for rows in self.world.ask("SELECT sum(cents) FROM account")]

    def _ask(self, xid: str, ended: str) -> None:
        if xid:
            contrary = txrpc.Outcome.ABORTED if ended == "committed" else txrpc.Outcome.COMMITTED
            assert self.manager.outcome(Xid.parse(xid), timeout=10) is not contrary


@pytest.fixture(scope="module")
def wards(servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Ward]]:
    """The ward; a new one if a cell has failed in it, or when its account has given nearly all that it had to the other bank."""
    made: list[Ward] = []

    def ward() -> Ward:
        if not made or made[-1].broken or made[-1].world.money()[0] < 20 * scenarios.CENTS:
            for old in made[-1:]:
                old.close()
            made.append(Ward(tmp_path_factory.mktemp("ward"), servers, 900 + len(made)))
        return made[-1]

    yield ward
    for last in made[-1:]:
        last.close()


def _marks(cell: Cell) -> list[pytest.MarkDecorator]:
    all_day = cell.action == "kill" and (cell.process, cell.point) in ALL_DAY
    return [] if all_day else [pytest.mark.proof]


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=_marks(cell), id=str(cell)) for cell in CELLS])
def test_rule_1_all_ends_alike_whatever_happens_at_this_point(wards: Callable[[], Ward], cell: Cell) -> None:
    ward = wards()
    ward.broken = True
    began = time.monotonic()
    xid, told = ward.play(cell)
    if cell.scenario.name.startswith("one "):
        ward.single.add(xid)
    ended = ward.check(cell, xid, told)
    ward.broken = False
    note_proof(
        "crash cell",
        process=cell.process,
        point=cell.point,
        action=cell.action + (f", {cell.given.name}" if cell.given else ""),
        told=told,
        ended=ended,
        seconds=round(time.monotonic() - began, 1),
    )


@pytest.mark.parametrize("torn", ["", "ready\n", "ready\ntold 01", "told 01 ", "told 01 comm", "told 01 committed"])
def test_a_line_that_a_killed_client_was_writing_is_not_read(torn: str) -> None:
    assert scenarios.what_it_was_told(torn) == ("", "nothing")
    assert scenarios.what_it_was_told("ready\ntold 01 committed\n") == ("01", "committed")
    assert scenarios.what_it_was_told("told  aborted\n") == ("", "aborted")


def test_the_matrix_has_every_point_and_every_process() -> None:
    killed = {(cell.process, cell.point) for cell in CELLS if cell.action == "kill"}
    assert {point for _, point in killed} == HERE
    assert {process for process, _ in killed} == {name for names in PROCESSES.values() for name in names}
    assert {f"{role}.{step}" for role, steps in SCENARIOS.items() for step in steps} == {
        f"{point.partition('.')[0]}.{point.partition('.')[2].partition('_')[2]}" for point in HERE
    }
    assert len([cell for cell in CELLS if cell.action == "kill" and cell.process in BANKS and not cell.given]) == 2 * 30
