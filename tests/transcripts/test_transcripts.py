"""What the machines do, word for word: each file of scenarios/ is read, carried out, and compared with what it says.

``pytest tests/transcripts --rewrite`` writes what they do today; the difference is then for a person to read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from tests.proof import note_proof
from tests.transcripts.machines import MACHINES
from txrpc._protocol.messages import FromCoordinator, ToCoordinator

FOLDER = Path(__file__).parent / "scenarios"
README = Path(__file__).parent / "README.md"
SCENARIOS = sorted(FOLDER.glob("*.txt"))
RULES = {*range(1, 17), 19, 20}
"""Those that the machines keep; the others are the shells'."""
OF_THE_SHELL = {"Hello", "Takeover", "Tick"}
"""Messages that no machine sends: two are about sessions, and the last only says what time it is."""


def carried_out(text: str) -> str:
    """The transcript as it should be."""
    head, *blocks = re.split(r"\n(?=> )", text.rstrip() + "\n")
    (kind,) = re.findall(r"^machine: (\w+)$", head, re.MULTILINE)
    machine = MACHINES[kind]()
    parts = [head.rstrip() + "\n"]
    for block in blocks:
        command = block.splitlines()[0].removeprefix("> ")
        parts.append("\n".join([f"> {command}", *machine.run(command)]) + "\n")
    return "\n".join(parts)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_transcript(path: Path, rewrite: bool) -> None:
    text = path.read_text()
    true = carried_out(text)
    if rewrite:
        path.write_text(true)
    assert text == true or rewrite
    note_proof("transcript", name=path.stem, rules=rules_of(text))


def rules_of(text: str) -> list[int]:
    """The rules that a scenario says that it shows."""
    return [
        int(number) for line in re.findall(r"^# Rules? ([\d, ]+)", text, re.MULTILINE) for number in line.split(",")
    ]


def test_there_are_enough_and_each_is_a_sentence_with_a_rule() -> None:
    assert len(SCENARIOS) >= 40
    assert [path.name for path in SCENARIOS if len(path.stem.split("_")) < 4] == []
    assert [path.name for path in SCENARIOS if not rules_of(path.read_text())] == []
    shown = {rule for path in SCENARIOS for rule in rules_of(path.read_text())}
    assert shown == RULES - {7}  # which is the log's


def test_every_word_of_the_language_and_every_message_occurs() -> None:
    text = "\n".join(path.read_text() for path in SCENARIOS)
    used = {(kind, line.split()[1]) for path in SCENARIOS for kind, line in commands(path)}
    assert used == {(kind, verb) for kind, machine in MACHINES.items() for verb in machine.verbs()}
    names = {kind.__name__ for kind in (*get_args(ToCoordinator), *get_args(FromCoordinator))}
    said = set(re.findall(r"^(?:to \S+|close \S+|send):? (\w+)", text, re.MULTILINE))
    # The commands commit, rollback, outcome and register.
    heard = {"CommitRequest", "RollbackRequest", "OutcomeRequest", "RegisterAnswer"}
    assert said | heard == names - OF_THE_SHELL


def commands(path: Path) -> list[tuple[str, str]]:
    text = path.read_text()
    (kind,) = re.findall(r"^machine: (\w+)$", text, re.MULTILINE)
    return [(kind, line) for line in text.splitlines() if line.startswith("> ")]


def test_the_index_is_true(rewrite: bool) -> None:
    head, begin, rest = README.read_text().partition("<!-- index -->\n")
    lines = []
    for path in SCENARIOS:
        rules = ", ".join(map(str, rules_of(path.read_text())))
        lines.append(f"| [{path.stem.replace('_', ' ')}](scenarios/{path.name}) | {rules} |\n")
    index = "| scenario | rules |\n|---|---|\n" + "".join(lines)
    if rewrite:
        README.write_text(head + begin + index)
    assert rest == index or rewrite
