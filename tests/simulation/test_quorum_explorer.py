"""Every interleaving of a small group: three acceptors, two epochs, and a disk that is lost; and that a mistake would be found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.proof import note_proof
from tests.protocol import test_quorum as mistakes
from verification.explorer import Mistake
from verification.quorum_explorer import STORIES, explore_group

SOON = ("two proposers", "a takeover")
LONG = ("a disk comes back from a backup", "two proposers begin at once", "two records")


def _marks(story: str) -> list[pytest.MarkDecorator]:
    if story in SOON:
        return []
    return [pytest.mark.proof, pytest.mark.timeout(900), *([pytest.mark.long] if story in LONG else [])]


@pytest.mark.parametrize("story", [pytest.param(story, marks=_marks(story)) for story in STORIES])
def test_rules_1_3_5_and_7_no_interleaving_of_a_group_contradicts_itself(story: str) -> None:
    found = explore_group(story)
    assert {"x1.1 committed", "x1.1 aborted"} <= found.ends, "both can happen"
    note_proof("group explorer", story=story, states=found.states, steps=found.steps)


MISTAKES: list[tuple[str, Callable[[], list[Any]]]] = [
    ("two proposers", mistakes._accepts_what_it_has_promised_not_to),
    ("two proposers", mistakes._forgets_its_promise),
    ("two proposers", mistakes._adopts_only_what_a_quorum_of_the_answers_has),
    ("two proposers", mistakes._counts_a_write_that_a_minority_has_accepted),
    ("a takeover", mistakes._forgets_its_promise),
    ("a disk is lost", mistakes._lets_an_empty_disk_vote),
    ("a disk comes back from a backup", mistakes._lets_an_empty_disk_vote),
]


@pytest.mark.parametrize(("story", "mutant"), MISTAKES, ids=lambda value: str(getattr(value, "__name__", value)))
def test_the_explorer_of_groups_finds_mistakes_as_well(story: str, mutant: Callable[[], list[Any]]) -> None:
    with ExitStack() as stack:
        for each in mutant():
            stack.enter_context(each)
        with pytest.raises(Mistake) as caught:
            explore_group(story)
    assert "the way there:" in str(caught.value)
    name = mutant.__name__.strip("_").replace("_", " ")
    note_proof("group explorer mutant", name=name, story=story, steps=len(caught.value.way))
