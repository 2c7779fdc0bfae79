"""Who is connected, against a dumb twin: a plain list of the open sessions, searched from end to end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from txrpc._protocol.coordinator.sessions import SessionRegistry
from txrpc._protocol.messages import PROTOCOL_VERSION, Hello, ResourceInfo
from txrpc.ids import ParticipantId

PROCESSES = [ParticipantId(bytes([number] * 8)) for number in range(4)]
NAMES = ["accounts", "audit", "stock"]


def hello(process: int, *names: str, identity: str = "") -> Hello:
    resources = tuple(ResourceInfo(name, "test", identity) for name in names)
    return Hello(PROTOCOL_VERSION, "bank", PROCESSES[process], f"process {process}", resources)


class Twin:
    """The open sessions, oldest first."""

    def __init__(self) -> None:
        self.sessions: list[tuple[int, Hello]] = []

    def owner(self, participant: ParticipantId) -> int | None:
        return next((n for n, hello in self.sessions if hello.participant == participant), None)

    def finishers(self, participant: ParticipantId, resource: str) -> set[int | None]:
        own = self.owner(participant)
        others = {n for n, hello in self.sessions if resource in {r.name for r in hello.resources}}
        return {own} if own is not None else set(others) or {None}


OPENS = st.tuples(st.just("open"), st.integers(0, 3), st.lists(st.sampled_from(NAMES), max_size=4))
CLOSES: st.SearchStrategy[tuple[str, int, list[str]]] = st.tuples(st.just("close"), st.integers(0, 20), st.just([]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.one_of(OPENS, CLOSES), max_size=40))
def test_the_directory_finds_what_a_search_finds(steps: list[tuple[str, int, list[str]]]) -> None:
    real, twin = SessionRegistry(), Twin()
    for number, (kind, which, names) in enumerate(steps):
        if kind == "open":
            previous = real.owner(PROCESSES[which])
            if previous is not None:
                assert real.remove(previous.session) is previous
                twin.sessions = [entry for entry in twin.sessions if entry[0] != previous.session]
            real.add(number, hello(which, *names), number)
            twin.sessions.append((number, hello(which, *names)))
        else:
            known = which in dict(twin.sessions)
            assert (real.remove(which) is not None) == known
            twin.sessions = [entry for entry in twin.sessions if entry[0] != which]
        assert len(real) == len(twin.sessions)
        for process in PROCESSES:
            owner = real.owner(process)
            assert (None if owner is None else owner.session) == twin.owner(process)
            for name in NAMES:
                finisher = real.finisher(process, name)
                assert (None if finisher is None else finisher.session) in twin.finishers(process, name)


def test_nothing_is_kept_of_sessions_that_are_gone() -> None:
    real = SessionRegistry()
    for number in range(10):
        real.add(number, hello(number % 4, "accounts", "accounts", "audit"), 0)
        real.remove(number)
    assert (real.sessions, real._by_participant, real._by_resource) == ({}, {}, {})
