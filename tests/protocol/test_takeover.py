"""Who is held to be dead, and who takes over: `NodeWatch` on what nodes show (design, section 7)."""

from __future__ import annotations

import dataclasses

from txrpc._protocol.takeover import LEFT, NodeRow, NodeWatch
from txrpc.ids import Epoch

BEAT_MS, TAKEOVER_MS = 500, 2_000
EPOCH = Epoch.make(1, 1)


class Board:
    """Three nodes, of which c1 has been there longest; each counts up unless a test says otherwise."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.silent: set[str] = set()
        self.rows = {f"c{n}": NodeRow(f"c{n}", EPOCH, f"c{n}", 1, n) for n in (1, 2, 3)}

    def change(self, node: str, **fields: object) -> None:
        self.rows[node] = dataclasses.replace(self.rows[node], **fields)  # type: ignore[arg-type]

    def beat(self, watch: NodeWatch, times: int = 1, mine: tuple[str, ...] = (), every_ms: int = BEAT_MS) -> list[str]:
        """Let that many beats pass; return what *watch* wants to take over in any of them."""
        wanted: list[str] = []
        for _ in range(times):
            self.now_ms += every_ms
            for node, row in self.rows.items():
                if node not in self.silent:
                    self.change(node, beat=row.beat + 1)
            wanted += [row.node for row in watch.observe(list(self.rows.values()), mine, self.now_ms)]
        return wanted


def watch(node: str) -> NodeWatch:
    return NodeWatch(node, BEAT_MS, TAKEOVER_MS)


def test_who_beats_is_left_alone() -> None:
    assert Board().beat(watch("c1"), 100) == []


def test_who_is_silent_for_long_enough_is_taken_over_by_the_leader_alone() -> None:
    board = Board()
    watches = {node: watch(node) for node in ("c1", "c3")}
    for each in (watches["c3"], watches["c1"]):
        board.beat(each)
    board.silent = {"c2"}
    assert board.beat(watches["c1"], 3) == []
    assert board.beat(watches["c1"]) == ["c2"]
    assert board.beat(watches["c1"], 5, mine=("c2",)) == []
    assert board.beat(watches["c3"], 10) == []


def test_the_next_in_rank_leads_when_the_leader_is_dead() -> None:
    board, second, third = Board(), watch("c2"), watch("c3")
    board.silent = {"c1"}
    assert set(board.beat(second, 8)) == {"c1"}
    assert second.leader(list(board.rows.values())) == "c2"
    board.beat(third, 8)
    assert third.leader(list(board.rows.values())) == "c2"
    assert third.live(list(board.rows.values())) == ["c2", "c3"]


def test_rank_is_how_long_a_node_has_been_there_so_that_one_that_comes_back_does_not_lead() -> None:
    board, second = Board(), watch("c2")
    board.beat(second)
    assert second.leader(list(board.rows.values())) == "c1"
    board.change("c1", started_ms=9)
    board.beat(second)
    assert second.leader(list(board.rows.values())) == "c2"


def test_equal_rank_is_decided_by_the_name() -> None:
    board, second = Board(), watch("c2")
    for node in board.rows:
        board.change(node, started_ms=7)
    board.beat(second)
    assert second.leader(list(board.rows.values())) == "c1"


def test_who_says_that_it_leaves_is_taken_over_at_once() -> None:
    board, first = Board(), watch("c1")
    board.beat(first)
    board.silent = {"c2"}
    board.change("c2", beat=LEFT)
    assert board.beat(first) == ["c2"]


def test_what_a_dead_holder_held_is_an_orphan_too_and_what_a_live_one_holds_is_not() -> None:
    board, first = Board(), watch("c1")
    board.change("c3", holder="c2")
    board.silent = {"c3"}
    assert board.beat(first, 8) == []
    board.silent = {"c2", "c3"}
    assert set(board.beat(first, 8)) == {"c2", "c3"}


def test_a_holder_that_was_restarted_looks_after_what_it_held() -> None:
    board, third = Board(), watch("c3")
    board.change("c2", holder="c3")
    board.silent = {"c2"}
    assert set(board.beat(third, 8)) == {"c2"}


def test_a_node_that_lives_again_comes_back_by_itself() -> None:
    board, first = Board(), watch("c1")
    board.change("c2", holder="c3")
    board.silent = {"c3"}
    assert "c2" not in board.beat(first, 8)


def test_who_stood_still_itself_does_not_conclude_that_all_others_are_dead() -> None:
    """A machine, or the log's database, that hangs for a minute: one observation in it is one beat, and not a minute."""
    board, first = Board(), watch("c1")
    board.beat(first)
    board.silent = {"c2", "c3"}
    assert board.beat(first, every_ms=60_000) == []
    board.silent = set()
    assert board.beat(first, 5) == []


def test_a_node_that_is_seen_for_the_first_time_has_all_its_time() -> None:
    board, first = Board(), watch("c1")
    board.silent = {"c2"}
    assert board.beat(first, 4) == []
    assert board.beat(first) == ["c2"]
