"""A log on the disks of a group: members that stop, come back, lose their disks, and are not what they seem."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.log.group import RunningGroup
from tests.log.test_contract import decision
from tests.waiting import eventually
from txrpc._decision_log.port import DecisionLog, LogError, NotRecorded, RecordUncertain
from txrpc._group.disk import FOUNDING, MEMBER, DiskFile, Standing
from txrpc._group.founding import answer, conclude
from txrpc._group.members import founders, tolerance
from txrpc._group.replica import NoQuorum
from txrpc._protocol.takeover import LEFT
from txrpc._wire.commands import view_to
from txrpc._wire.v1 import peer_pb2, peer_pb2_grpc
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import Epoch


@pytest.fixture
def group(tmp_path: Path) -> Iterator[RunningGroup]:
    made = RunningGroup(tmp_path)
    yield made
    made.close()


def log_of(group: RunningGroup, member: str) -> DecisionLog:
    return group.running[member].make_log()


def slots(group: RunningGroup, member: str, log: str) -> int:
    return group.running[member]._acceptor.state(log).result().slot


# ----------------------------------------------------------------------------------------------- one member is down


def test_a_minority_may_be_down_and_is_given_what_it_has_missed(group: RunningGroup) -> None:
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    log.record([decision(epoch)])
    group.stop("c3")
    missed = [decision(epoch) for _ in range(3)]
    for each in missed:
        log.record([each])
    group.start("c3")

    def has_all() -> bool:
        log.bind({}, {})
        return slots(group, "c3", "c1") == 5

    eventually(has_all, 20)
    held = group.running["c3"]._acceptor.state("c1").result().decisions
    assert all(held[each.xid] == each for each in missed)


def test_what_a_dead_member_had_recorded_another_one_takes_over(group: RunningGroup) -> None:
    """Rule 3: a quorum has it on its disks."""
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    decisions = [decision(epoch, 1_000 + number) for number in range(20)]
    for each in decisions:
        log.record([each])
    log.done([decisions[0].xid], 5_000)
    group.stop("c1")
    other = log_of(group, "c3")
    opened = other.open("c1", 2, "c3", epoch)
    assert opened.epoch == Epoch.make(2, 2)
    assert opened.lineage == {epoch: 20}
    assert opened.pending == tuple(decisions[1:])
    assert other.outcome(decisions[0].xid) == decisions[0]
    other.record([decision(epoch)])


@pytest.mark.proof
def test_without_a_quorum_nothing_is_decided_and_it_goes_on_by_itself(group: RunningGroup) -> None:
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    zero, one, two = decision(epoch), decision(epoch), decision(epoch)
    log.record([zero])
    group.stop("c2")
    group.stop("c3")
    with pytest.raises(RecordUncertain, match="c2: no answer"):
        log.record([one])
    with pytest.raises(NotRecorded, match="too few members"):  # it was never sent
        log.record([two])
    with pytest.raises(LogError, match="too few members"):
        log.done([zero.xid], 5)
    with pytest.raises(NoQuorum, match="c2: no answer"):
        log_of(group, "c1").open("c2", 1)
    assert log.outcome(one.xid) is None
    group.start("c2")
    assert log.record([one]) == 2
    assert log.record([two]) == 3
    assert log.outcome(one.xid) == one


def test_a_decision_costs_one_message_to_each_peer_and_one_forced_write_on_each_disk(
    group: RunningGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does a batch of a hundred decisions; on a machine that is so slow that questions are repeated, more."""
    monkeypatch.setattr("txrpc._group.replica._AGAIN_S", 60.0)
    group.start()
    sent: list[str] = []
    answers: list[str] = []
    peers = group.running["c1"]._peers
    ask = peers.ask

    def counting(member: str, message: peer_pb2.PeerQuestion, answered: Callable[[Any], None]) -> None:
        def counted(answer: Any) -> None:
            answered(answer)
            answers.append(member)

        sent.append(member)
        ask(member, message, counted)

    def saves() -> list[int]:
        """When all that was asked has been answered, which is after it was written."""
        eventually(lambda: len(answers) == len(sent))
        for member in group.running.values():
            member._acceptor.state("c1").result()
        return [member._acceptor.saves for member in group.running.values()]

    peers.ask = counting  # type: ignore[method-assign]
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    eventually(lambda: {slots(group, name, "c1") for name in group.running} == {1})
    for batch in ([decision(epoch)], [decision(epoch) for _ in range(100)]):
        before = saves()
        sent.clear()
        answers.clear()
        log.record(batch)
        assert saves() == [number + 1 for number in before]
        assert sorted(sent) == ["c2", "c3"]


def test_everyone_is_down_at_once(group: RunningGroup) -> None:
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    one = decision(epoch)
    log.record([one])
    log.bind({"bank": "7/1"}, {})
    for name in list(group.running):
        group.stop(name)
    group.start()
    opened = log_of(group, "c1").open("c1", 2)
    assert opened.pending == (one,)
    assert dict(opened.identities) == {"bank": "7/1"}


# ----------------------------------------------------------------------------------------------- disks


def test_a_member_that_has_lost_its_disk_votes_only_when_it_has_been_admitted(group: RunningGroup) -> None:
    """V7: until then its answers would be those of one that has forgotten what it has promised."""
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    one = decision(epoch)
    log.record([one])
    group.stop("c3")
    for file in group.path("c3").parent.glob("c3.db*"):
        file.unlink()
    assert group.start("c3") == [True]
    assert group.running["c3"]._acceptor.standing.incarnation != 1
    group.stop("c2")
    with pytest.raises(RecordUncertain):  # c1 alone is no quorum, and c3 does not count yet
        log.record([decision(epoch)])
    group.start("c2")

    def admitted() -> bool:
        log.bind({}, {})
        return slots(group, "c3", "c1") > 3

    eventually(admitted, 20)
    group.stop("c2")
    log.record([decision(epoch)])
    group.stop("c1")
    group.start("c2")
    assert one in log_of(group, "c3").open("c1", 2, "c3").pending


def test_a_member_with_another_disk_has_itself_admitted_to_the_log_that_all_share(group: RunningGroup) -> None:
    """Perhaps no member has that one open; the names in it would be lost with the next disk."""
    group.start()
    log = log_of(group, "c1")
    log.open("c1", 1)
    log.bind({"bank": "7/1"}, {})
    for name in list(group.running):
        group.stop(name)
    for file in group.path("c3").parent.glob("c3.db*"):
        file.unlink()
    group.start()
    other = log_of(group, "c3")
    other.open("c3", 1)

    def admitted() -> bool:
        known = other.bind({}, {}) == {"bank": "7/1"}
        return known and all(group.running["c3"]._acceptor.votes(log) for log in ("*", "c3"))

    eventually(admitted, 20)
    group.stop("c2")
    assert log_of(group, "c3").open("c3", 2).identities == {"bank": "7/1"}


def beat_all(group: RunningGroup) -> None:
    for name, member in group.running.items():
        member.heartbeats._keep_at = 0.0
        group.beat(name)


def older_disk(group: RunningGroup, name: str, work: Callable[[], object]) -> None:
    """Let *work* be done after a backup of that member's disk, and put the backup in its place; the member is stopped then."""
    group.stop(name)
    backup = group.path(name).read_bytes()
    group.start(name)
    back = time.monotonic()
    others = [member for other, member in group.running.items() if other != name]

    def takes_part() -> bool:
        """Or the work may be done without it: its peers connect to it again only after a while."""
        beat_all(group)
        return all(each.heartbeats._answered.get(name, 0.0) > back for each in others)

    eventually(takes_part, 20)
    before = group.running[name]._acceptor.saves
    work()

    def remembered() -> bool:
        beat_all(group)
        saves = group.running[name]._acceptor.saves
        return saves > before and all(each._acceptor.heard().get(name, (1, 0))[1] == saves for each in others)

    eventually(remembered, 20)
    group.stop(name)
    for file in group.path(name).parent.glob(f"{name}.db*"):
        file.unlink()
    group.path(name).write_bytes(backup)


def test_rule_18_a_disk_from_a_backup_does_not_vote_until_it_has_been_admitted(
    group: RunningGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has answered since is not on it, and it cannot know that: its peers tell it."""
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    decisions = [decision(epoch) for _ in range(10)]

    def work() -> None:
        for each in decisions:
            log.record([each])

    older_disk(group, "c3", work)
    assert group.start("c3") == [True]
    acceptor = group.running["c3"]._acceptor
    assert acceptor.standing.incarnation != 1
    assert "the disk is an older one: its logs are given to it anew" in [record.message for record in caplog.records]

    def admitted() -> bool:
        log.bind({}, {})
        return acceptor.state("c1").result().position == 10

    eventually(admitted, 20)
    group.stop("c2")
    log.record([decision(epoch)])
    assert group.start("c2") == [True]
    assert group.running["c2"]._acceptor.standing.incarnation == 1


def test_rule_18_a_disk_from_a_backup_is_known_also_when_all_members_are_restarted(group: RunningGroup) -> None:
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    older_disk(group, "c3", lambda: [log.record([decision(epoch)]) for _ in range(10)])
    group.stop("c1")
    group.stop("c2")
    assert group.start() == [True, True, True]
    incarnations = {name: member._acceptor.standing.incarnation for name, member in group.running.items()}
    assert [name for name, incarnation in incarnations.items() if incarnation != 1] == ["c3"]
    assert len(log_of(group, "c1").open("c1", 2).pending) == 10


def test_a_member_that_reaches_too_few_to_be_sure_of_its_disk_answers_nothing(group: RunningGroup) -> None:
    group.start()
    for name in ("c1", "c2", "c3"):
        group.stop(name)
    assert group.start("c2", timeout_s=0.5) == [False]
    with grpc.insecure_channel(group.members.addresses["c2"]) as channel:
        question = peer_pb2.PeerQuestion(
            group=label(group, "c1"), log="c1", epoch=5, view=1, prepare=peer_pb2.PrepareSlot()
        )
        with pytest.raises(grpc.RpcError) as raised:
            peer_pb2_grpc.PeerStub(channel).Ask(question)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_empty_disk_of_the_first_member_founds_no_second_group(group: RunningGroup) -> None:
    group.start()
    epoch = log_of(group, "c1").open("c1", 1).epoch
    assert epoch.number == 1
    group.stop("c1")
    for file in group.path("c1").parent.glob("c1.db*"):
        file.unlink()
    assert group.start("c1") == [True]
    standings = {name: member._acceptor.standing for name, member in group.running.items()}
    assert len({each.group_id for each in standings.values()}) == 1
    assert standings["c1"].incarnation != 1
    assert log_of(group, "c2").open("c1", 2, "c2").epoch.number == 2


def test_a_group_begins_when_all_members_are_there(group: RunningGroup) -> None:
    assert group.start("c1", "c2", timeout_s=1.0) == [False, False]
    stub = peer_pb2_grpc.PeerStub(grpc.insecure_channel(group.members.addresses["c1"]))
    question = peer_pb2.PeerQuestion(
        group=label(group, "c2"), log="c1", epoch=5, view=1, prepare=peer_pb2.PrepareSlot()
    )
    with pytest.raises(grpc.RpcError) as raised:
        stub.Ask(question)
    assert "no member of the group yet" in str(raised.value)
    for name in ("c1", "c2"):
        group.stop(name)
    assert group.start() == [True, True, True]
    assert {member._acceptor.standing.incarnation for member in group.running.values()} == {1}


def test_the_disk_of_another_node_is_refused(group: RunningGroup) -> None:
    group.start()
    group.stop("c2")
    with pytest.raises(ConfigurationError, match="is that of node 'c2', not of 'c3'"):
        DiskFile(str(group.path("c2")), "c3")
    with pytest.raises(ConfigurationError, match="not a database"):
        file = group.path("c9")
        file.write_text("this is no database, whatever its name says" * 50)
        DiskFile(str(file), "c9")
    disk = DiskFile(str(group.path("c2")), "c2")
    with pytest.raises(ConfigurationError, match="locked"):
        DiskFile(str(group.path("c2")), "c2")
    disk._connection.execute("UPDATE acceptor SET version = 9").close()
    disk.close()
    with pytest.raises(ConfigurationError, match="upgrade this coordinator"):
        DiskFile(str(group.path("c2")), "c2")


def test_a_disk_from_another_group_of_the_same_name_is_refused(group: RunningGroup, tmp_path: Path) -> None:
    group.start()
    group.stop("c3")
    (tmp_path / "other").mkdir()
    other = RunningGroup(tmp_path / "other")
    other.start()
    other.stop("c3")
    other.close()
    shutil.copy(other.path("c3"), group.path("c3"))
    group.start("c3", timeout_s=1.0)
    log = log_of(group, "c3")
    with pytest.raises(NoQuorum, match="another group of the same name"):
        log.open("c3", 1)


def test_a_disk_that_takes_nothing_answers_nothing_and_works_again_later(
    group: RunningGroup, caplog: pytest.LogCaptureFixture
) -> None:
    group.start()
    log = log_of(group, "c1")
    epoch = log.open("c1", 1).epoch
    file = group.running["c1"]._acceptor._file
    file._connection.execute("PRAGMA query_only=1").close()
    with caplog.at_level(logging.INFO, "txrpc.decision_log"):
        one = decision(epoch)
        log.record([one])  # by the other two, maybe before this disk is asked at all
        eventually(lambda: "disk trouble" in caplog.messages)
        file._connection.execute("PRAGMA query_only=0").close()
        eventually(lambda: log.bind({}, {}) is not None and slots(group, "c1", "c1") == 2, 20)
    assert caplog.messages.count("disk trouble") == 1
    assert "disk works again" in caplog.messages
    assert group.running["c1"]._acceptor.state("c1").result().decisions == {one.xid: one}


# ----------------------------------------------------------------------------------------------- founding, by itself


def test_who_is_a_member_stays_one_whatever_it_had_asked_before() -> None:
    """It was told "member" while it asked; it would have become a new incarnation, and so would all others have."""
    member = Standing(MEMBER, 7)
    assert conclude(member, {"c1": peer_pb2.FoundReply(stage=MEMBER, id=7)}, 2, first=False) == member


@pytest.mark.parametrize(
    ("held", "wanted", "group_id", "becomes"),
    [
        (Standing(), FOUNDING, 7, Standing(FOUNDING, 7)),
        (Standing(FOUNDING, 6), FOUNDING, 7, Standing(FOUNDING, 7)),
        (Standing(FOUNDING, 7), MEMBER, 7, Standing(MEMBER, 7)),
        (Standing(FOUNDING, 6), MEMBER, 7, Standing(FOUNDING, 6)),
        (Standing(), MEMBER, 7, Standing()),
        (Standing(MEMBER, 6), FOUNDING, 7, Standing(MEMBER, 6)),
        (Standing(MEMBER, 6, 99), MEMBER, 6, Standing(MEMBER, 6, 99)),
    ],
)
def test_what_a_disk_becomes_when_the_first_member_asks(
    held: Standing, wanted: peer_pb2.DiskStage.ValueType, group_id: int, becomes: Standing
) -> None:
    assert answer(held, wanted, group_id) == becomes


def test_the_first_member_begins_when_all_have_agreed_and_not_before() -> None:
    founding, empty = peer_pb2.FoundReply(stage=FOUNDING, id=7), peer_pb2.FoundReply()
    assert conclude(Standing(), {"c2": empty}, 2, first=True) == Standing()
    assert conclude(Standing(), {"c2": empty, "c3": founding}, 2, first=True).stage == FOUNDING
    held = Standing(FOUNDING, 7)
    assert conclude(held, {"c2": founding, "c3": empty}, 2, first=True) == held
    assert conclude(held, {"c2": founding, "c3": founding}, 2, first=True) == Standing(MEMBER, 7)
    assert conclude(held, {"c2": founding, "c3": founding}, 2, first=False) == held


def test_a_disk_that_comes_too_late_for_the_founding_is_a_new_incarnation() -> None:
    member = peer_pb2.FoundReply(stage=MEMBER, id=7)
    for held, first in (
        (Standing(), False),
        (Standing(), True),
        (Standing(FOUNDING, 7), True),
        (Standing(FOUNDING, 6), False),
    ):
        became = conclude(held, {"c2": member}, 2, first=first)
        assert (became.stage, became.group_id) == (MEMBER, 7)
        assert became.incarnation > 1
    assert conclude(Standing(FOUNDING, 7), {"c2": member}, 2, first=False) == Standing(MEMBER, 7)
    others = {"c2": member, "c3": peer_pb2.FoundReply(stage=MEMBER, id=8)}
    with pytest.raises(ConfigurationError, match="different groups"):
        conclude(Standing(), others, 2, first=True)


# ----------------------------------------------------------------------------------------------- peers


def label(group: RunningGroup, sender: str, changes: dict[str, Any] | None = None) -> peer_pb2.PeerGroup:
    changes = dict(changes or {})
    view = view_to(replace(group.members, **changes.pop("view", {})))
    group_id = next(iter(group.running.values()))._acceptor.standing.group_id
    return peer_pb2.PeerGroup(**{"name": "bank", "id": group_id, "sender": sender, "view": view, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "shop"}, "a member of group 'bank', not of 'shop'"),
        ({"view": {"addresses": {"c1": "h:1", "c2": "h:2"}}}, "the members are c1,c2,c3 here, and c1,c2 there"),
        ({"view": {"writes": 3}}, "the quorums are 2 and 2 here, and 2 and 3 there"),
        ({"id": 12345}, "another group of the same name"),
        ({"sender": "c1"}, "this is you"),
        ({"sender": "c9"}, "'c9' is none of the other members"),
    ],
)
def test_a_peer_with_another_idea_of_the_group_gets_no_answer(
    group: RunningGroup, changes: dict[str, Any], says: str
) -> None:
    group.start()
    with grpc.insecure_channel(group.members.addresses["c1"]) as channel:
        stub = peer_pb2_grpc.PeerStub(channel)
        asked = label(group, "c2", changes)
        for call in (
            lambda: stub.Ask(
                peer_pb2.PeerQuestion(group=asked, log="c1", epoch=5, view=1, prepare=peer_pb2.PrepareSlot())
            ),
            lambda: stub.Beat(peer_pb2.PeerBeat(group=asked)),
            lambda: stub.Found(peer_pb2.FoundRequest(group=asked)),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                call()
            assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert says in str(raised.value.details())


def test_garbage_gets_no_answer(group: RunningGroup) -> None:
    group.start()
    with grpc.insecure_channel(group.members.addresses["c1"]) as channel:
        stub = peer_pb2_grpc.PeerStub(channel)
        mine = label(group, "c2")
        prepare = peer_pb2.PrepareSlot()
        for question in (
            peer_pb2.PeerQuestion(group=mine, log="c1", epoch=5, view=1),
            peer_pb2.PeerQuestion(group=mine, log="c1", epoch=5, prepare=prepare),
            peer_pb2.PeerQuestion(group=mine, log="c 1", epoch=5, view=1, prepare=prepare),
            peer_pb2.PeerQuestion(group=mine, log="c1", epoch=1 << 63, view=1, prepare=prepare),
            peer_pb2.PeerQuestion(group=mine, log="c1", epoch=5, view=2, prepare=prepare),
            peer_pb2.PeerQuestion(group=mine, log="c1", epoch=5, view=1, accept=peer_pb2.AcceptSlot(slot=1)),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                stub.Ask(question)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert log_of(group, "c1").open("c1", 1).epoch.number == 1


def test_rule_15_a_forged_epoch_does_not_keep_the_owner_from_opening_its_log(group: RunningGroup) -> None:
    group.start()
    log = log_of(group, "c1")
    one = decision(log.open("c1", 1).epoch)
    log.record([one])
    for name, address in group.members.addresses.items():
        with grpc.insecure_channel(address) as channel:
            mine = label(group, "c3" if name == "c2" else "c2")
            question = peer_pb2.PeerQuestion(group=mine, log="c1", view=1, prepare=peer_pb2.PrepareSlot())
            question.epoch = ((1 << 31) - 1) << 32
            answer = peer_pb2_grpc.PeerStub(channel).Ask(question)
            assert answer.WhichOneof("answer") == "refused"
    assert log.record([decision(one.epoch)]) == 2
    assert log_of(group, "c1").open("c1", 2).epoch.number == 2


# ----------------------------------------------------------------------------------------------- heartbeats


def test_members_see_each_other_also_through_a_third_one(group: RunningGroup) -> None:
    group.start()
    for number, (name, member) in enumerate(group.running.items()):
        log_of(group, name).open(name, 1)
        member.heartbeats.join(name, "bank", 1_000 + number)

    def seen_by(name: str) -> dict[str, tuple[int, str, int]]:
        rows = group.beat(name)
        return {row.node: (row.epoch.number, row.holder, row.started_ms) for row in rows}

    everyone = {"c1": (1, "c1", 1_000), "c2": (1, "c2", 1_001), "c3": (1, "c3", 1_002)}
    for name in group.running:
        eventually(lambda name=name: seen_by(name) == everyone, 60)  # type: ignore[misc]
    cut(group, "c1", "c2")
    cut(group, "c2", "c1")
    before = beat_seen(group, "c1", "c2")

    def grows() -> bool:
        for name in group.running:
            group.beat(name)
        return beat_seen(group, "c1", "c2") > before + 3

    eventually(grows, 20)


def cut(group: RunningGroup, one: str, other: str) -> None:
    """From now on the heartbeats of *one* do not reach the *other*."""
    peers = group.running[one]._peers
    beat = peers.beat
    peers.beat = lambda to, *rest: None if to == other else beat(to, *rest)  # type: ignore[method-assign]


def beat_seen(group: RunningGroup, by: str, node: str) -> int:
    (row,) = [row for row in group.beat(by) if row.node == node]
    return row.beat


def test_one_that_leaves_says_so_and_one_that_comes_back_is_later_whatever_its_clock_says(group: RunningGroup) -> None:
    group.start()
    for name, member in group.running.items():
        log_of(group, name).open(name, 1)
        member.heartbeats.join(name, "bank", 5_000)
    eventually(lambda: len(group.beat("c1")) == 3, 60)
    group.beat("c2")
    group.running["c2"].heartbeats.leave()

    def beat_of(node: str) -> tuple[int, int]:
        (row,) = [row for row in group.beat("c1") if row.node == node]
        return row.beat, row.started_ms

    eventually(lambda: beat_of("c2") == (LEFT, 5_000), 60)
    group.stop("c2")
    group.start("c2")
    log_of(group, "c2").open("c2", 2)
    group.running["c2"].heartbeats.join("c2", "bank", 17)

    def is_back() -> bool:
        group.beat("c2")
        beat, started_ms = beat_of("c2")
        return beat > LEFT and started_ms > 5_000

    eventually(is_back, 60)


def test_one_that_reaches_too_few_does_not_show_that_it_lives(group: RunningGroup) -> None:
    group.start()
    log_of(group, "c1").open("c1", 1)
    beats = group.running["c1"].heartbeats
    beats.join("c1", "bank", 1_000)
    eventually(lambda: group.beat("c1")[0].beat > 3, 60)
    group.stop("c2")
    group.stop("c3")

    def refuses() -> bool:
        try:
            beats.beat()
        except LogError as error:
            return "too few members" in str(error)
        return False

    eventually(refuses, 60)
    before = beats.told().nodes[0].beat
    assert refuses()
    assert beats.told().nodes[0].beat == before


# ----------------------------------------------------------------------------------------------- members


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("c1", "NODE=HOST:PORT"),
        ("c1=host", "NODE=HOST:PORT"),
        ("c1=host:99999", "NODE=HOST:PORT"),
        ("c 1=host:1", "node"),
        ("c1=a:1,c1=b:1", "two members have one name: c1"),
        ("c1=a:1,c2=a:1", "two members have one address: a:1"),
    ],
)
def test_a_list_of_members_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        founders(text)


@pytest.mark.parametrize(
    ("size", "reads", "writes", "says"),
    [
        (3, 0, 0, "with any 1 members down"),
        (5, 0, 0, "2 members down"),
        (3, 1, 3, "decisions go on with no member down"),
        (3, 1, 3, "no lost disk can be replaced"),
        (3, 3, 1, "survives the loss of no disk"),
    ],
)
def test_what_a_group_survives_is_said_in_words(size: int, reads: int, writes: int, says: str) -> None:
    text = ",".join(f"c{number}=host:{number + 1}" for number in range(size))
    assert says.replace("any 1 members", "1 member") in tolerance(founders(text, reads, writes))


def test_quorums_that_may_miss_each_other_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="more than 3"):
        founders("c1=a:1,c2=a:2,c3=a:3", 1, 2)


def test_a_takeover_expects_an_epoch_and_disturbs_no_later_one(group: RunningGroup) -> None:
    group.start()
    first = log_of(group, "c1")
    epoch = first.open("c1", 1).epoch
    again = log_of(group, "c1")
    later = again.open("c1", 2).epoch
    with pytest.raises(Fenced, match="not in epoch 1"):
        log_of(group, "c3").open("c1", 3, "c3", epoch)
    again.record([decision(later)])
