"""What a log in etcd does when etcd answers late, not at all, or with what is not a proof."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from tests.etcd import EtcdCluster, programs
from tests.log.test_contract import decision
from tests.waiting import eventually
from txrpc._decision_log.port import Decision, LogError, NotRecorded, PreparedBranch, RecordUncertain
from txrpc._etcd import client as etcd_client
from txrpc._etcd import log as etcd_log
from txrpc._etcd.client import EtcdClient, EtcdFull, one, under
from txrpc._etcd.heartbeats import EtcdHeartbeats
from txrpc._etcd.keys import Keys
from txrpc._etcd.log import EtcdLog
from txrpc._etcd.url import parsed
from txrpc._protocol.takeover import LEFT
from txrpc._wire.v1 import etcd_pb2 as pb
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import Epoch

LogAt = Callable[[str], EtcdLog]


@pytest.fixture
def log_at() -> Iterator[LogAt]:
    """``log_at(url)``: closed at the end."""
    logs: list[EtcdLog] = []

    def make(url: str) -> EtcdLog:
        logs.append(EtcdLog(url))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def url(etcd: EtcdCluster, request: pytest.FixtureRequest) -> str:
    return etcd.url(f"test/{abs(hash(request.node.nodeid))}")


def losing_answers(monkeypatch: pytest.MonkeyPatch, count: int, method: str = "KV/Txn") -> list[str]:
    """The next *count* calls of *method* are carried out, and their answers are lost; returns what has been lost."""
    lost: list[str] = []
    tries = EtcdClient._try

    def mistaken(self: EtcdClient, called: str, request: Any, reply: Any) -> Any:
        answer = tries(self, called, request, reply)
        if called == method and len(lost) < count and not (method == "KV/Txn" and not request.compare):
            lost.append(called)
            raise Lost(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        return answer

    monkeypatch.setattr(EtcdClient, "_try", mistaken)
    return lost


def sized(like: Decision, size: int) -> Decision:
    """A decision of about so many bytes."""
    one = PreparedBranch(like.branches[0].branch, like.branches[0].participant, "b" * 40, "7" * 64)
    return replace(like, branches=(one,) * (size // 130))


def recorded(log: EtcdLog, batch: list[Decision]) -> int:
    """The position, or 0 if it is to be tried again."""
    try:
        return log.record(batch)
    except RecordUncertain:
        return 0


class Lost(grpc.RpcError):
    """An error of gRPC's."""

    def __init__(self, code: grpc.StatusCode, said: str) -> None:
        self._code, self._said = code, said

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._said


# ------------------------------------------------------------------------------------------------- answers that are lost


def test_a_write_whose_answer_is_lost_is_done_once(url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    lost = losing_answers(monkeypatch, 1)
    one = decision(epoch)
    assert log.record([one]) == 1
    assert lost
    assert log.record([decision(epoch)]) == 2
    assert log_at(url).open("c1", 2).lineage == {epoch: 2}


def test_an_open_whose_answer_is_lost_takes_the_next_epoch(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = losing_answers(monkeypatch, 1)
    log = log_at(url)
    opened = log.open("c1", 7)
    assert lost
    assert opened.epoch == Epoch.make(2, 7)
    assert opened.lineage == {Epoch.make(1, 7): 0}
    assert log.record([decision(opened.epoch)]) == 1


def test_what_is_not_answered_at_all_is_uncertain_and_the_same_batch_goes_on_later(
    own_etcd: EtcdCluster, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_client, "_CALL_S", 0.5)
    log = log_at(own_etcd.url())
    epoch = log.open("c1", 1).epoch
    for name in ("e2", "e3"):
        own_etcd.members[name].suspend()
    batch = [decision(epoch), decision(epoch)]
    for _ in range(2):
        with pytest.raises(RecordUncertain, match="no answer yet from etcd://"):
            log.record(batch)
    for read in (log.pending, lambda: log.outcome(batch[0].xid), lambda: log.bind({}, {})):
        with pytest.raises(LogError):
            read()
    for name in ("e2", "e3"):
        own_etcd.members[name].resume()
    own_etcd.wait()
    eventually(lambda: recorded(log, batch) >= 2, 60)
    assert set(log.pending()) == set(batch)


def test_rule_18_a_write_that_comes_late_does_not_set_the_log_back(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lay somewhere on its way while its repetition, and others, were carried out."""
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    sent: list[pb.EtcdTransaction] = []
    transact = EtcdClient.transact

    def recorded(self: EtcdClient, transaction: pb.EtcdTransaction) -> Any:
        sent.append(transaction)
        return transact(self, transaction)

    monkeypatch.setattr(EtcdClient, "transact", recorded)
    first = decision(epoch)
    log.record([first])
    late = sent[-1]
    log.record([decision(epoch)])
    log.done([first.xid], 2_000)
    log.forget(3_000, 10)
    client = EtcdClient(parsed(url))
    assert not transact(client, late).succeeded
    client.close()
    assert log.record([decision(epoch)]) == 3
    opened = log_at(url).open("c1", 2)
    assert first not in opened.pending
    assert opened.lineage == {epoch: 3}


def test_a_mark_of_done_that_was_not_heard_of_does_not_hide_a_decision(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    first, second = decision(epoch), decision(epoch)
    log.record([first])
    monkeypatch.setattr(etcd_client, "_CALL_S", 0.2)
    lost = losing_answers(monkeypatch, 50)
    with pytest.raises(LogError):
        log.done([first.xid], 2_000)
    with pytest.raises(RecordUncertain):
        log.record([second])
    lost += [""] * 50
    assert log.record([second]) >= 2
    log.done([first.xid], 2_000)
    assert set(log.pending()) == {second}
    assert log.outcome(first.xid) == first


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT]
)
def test_that_a_repetition_was_refused_says_nothing_about_the_first_try(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode
) -> None:
    """It may still be under way, and be carried out when its transactions have been aborted."""
    log = log_at(url)
    batch = [decision(log.open("c1", 1).epoch)]
    answers = [grpc.StatusCode.UNAVAILABLE, code]
    tries = EtcdClient._try

    def mistaken(self: EtcdClient, called: str, request: Any, reply: Any) -> Any:
        if answers and called == "KV/Txn" and request.compare:
            raise Lost(answers.pop(0), "no")
        return tries(self, called, request, reply)

    monkeypatch.setattr(EtcdClient, "_try", mistaken)
    with pytest.raises(RecordUncertain):
        log.record(batch)
    answers[:] = [code]
    with pytest.raises(RecordUncertain):
        log.record(batch)
    assert log.record(batch) == 1


def test_etcd_that_is_full_has_written_what_it_has_written(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers "no space" to the last write that it had space for, and to those that it had none for."""
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    transact = EtcdClient.transact
    written = True

    def full(self: EtcdClient, transaction: pb.EtcdTransaction) -> Any:
        if transaction.compare and written:
            transact(self, transaction)
        if transaction.compare:
            raise EtcdFull("etcdserver: mvcc: database space exceeded")
        return transact(self, transaction)

    monkeypatch.setattr(EtcdClient, "transact", full)
    first, second = decision(epoch), decision(epoch)
    assert log.record([first]) == 1
    written = False
    with pytest.raises(NotRecorded, match="space exceeded"):
        log.record([second])
    with pytest.raises(LogError, match="space exceeded"):
        log.done([first.xid], 2_000)
    monkeypatch.setattr(EtcdClient, "transact", transact)
    assert set(log.pending()) == {first}
    assert log.record([second]) == 2


def test_a_batch_is_split_where_etcd_would_refuse_it(url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of its decisions, and by their size; the second part may fail, and then nothing of it may be aborted."""
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    many = [decision(epoch, n) for n in range(300)]
    assert log.record(many) == 300
    large = [sized(decision(epoch, n), 200_000) for n in range(6)]
    assert log.record(large) == 306
    log.done([each.xid for each in many], 5_000)
    assert set(log.pending()) == set(large)
    assert log.forget(6_000, 200) == 200
    assert log.forget(6_000, 200) == 100
    monkeypatch.setattr(etcd_log, "_DECISION_BYTES", 2_000_000)
    larger = sized(decision(epoch), 1_700_000)
    with pytest.raises(NotRecorded, match="request is too large: begin smaller transactions"):
        log.record([larger])
    with pytest.raises(RecordUncertain, match="request is too large"):
        log.record([*(decision(epoch) for _ in range(120)), larger])
    monkeypatch.undo()
    with pytest.raises(NotRecorded, match="is too large for etcd: begin smaller transactions"):
        log.record([*(decision(epoch) for _ in range(120)), larger])
    assert len(log_at(url).open("c1", 2).pending) == 126


# ---------------------------------------------------------------------------------------------------------- members


@pytest.mark.proof
def test_any_member_may_die_or_freeze(own_etcd: EtcdCluster, log_at: LogAt) -> None:
    log = log_at(own_etcd.url())
    epoch = log.open("c1", 1).epoch
    position = 0
    for name, member in own_etcd.members.items():
        for stop, back in ((member.suspend, member.resume), (member.kill, member.launch)):
            stop()
            batch = [decision(epoch)]
            # Its leader may be gone: the same batch, as the coordinator does.
            eventually(partial(recorded, log, batch), 60)
            back()
            own_etcd.wait()
            reached = log.record([])
            assert reached > position, name
            position = reached
    assert len(log_at(own_etcd.url()).open("c1", 2).pending) == 2 * len(own_etcd.members)


def test_rule_18_an_etcd_restored_from_a_backup_is_seen_to_have_lost_decisions(url: str, log_at: LogAt) -> None:
    """Its revisions may go on from a greater number; how far the log had come does not."""
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    log.record([decision(epoch)])
    client = EtcdClient(parsed(url))
    (backup,) = client.read(under(f"{parsed(url).prefix}/".encode()))
    reached = log.record([decision(epoch), decision(epoch)])
    (now,) = client.read(under(f"{parsed(url).prefix}/".encode()))
    gone = [pb.EtcdOperation(delete=pb.EtcdDelete(key=each.key)) for each in now]
    client.transact(pb.EtcdTransaction(success=gone))
    back = [pb.EtcdOperation(put=pb.EtcdPut(key=each.key, value=each.value)) for each in backup]
    client.transact(pb.EtcdTransaction(success=back))
    client.close()
    opened = log_at(url).open("c1", 2)
    assert opened.lineage[epoch] == 1 < reached


def test_what_is_not_txrpcs_is_refused_by_name(url: str, log_at: LogAt) -> None:
    log_at(url).open("c1", 1)
    client = EtcdClient(parsed(url))
    keys = Keys(parsed(url).prefix, "c1")

    def put(key: bytes, value: bytes) -> None:
        client.transact(pb.EtcdTransaction(success=[pb.EtcdOperation(put=pb.EtcdPut(key=key, value=value))]))

    for key, value, said in (
        (keys.version, b"2", "is of version 2, and this txrpc knows version 1: upgrade"),
        (keys.node, b"{}", "no epoch of a node"),
        (keys.pending + b"00", b"\xff\xff", "not a LogDecision"),
        (keys.epoch(Epoch.make(1, 1)), b"soon", "no progress of a log"),
        (keys.forgotten, b"never", "no number"),
    ):
        (held,) = client.read(one(key))
        put(key, value)
        with pytest.raises(ConfigurationError, match=said):
            log_at(url).open("c1", 2)
        if held:
            put(key, held[0].value)
        else:
            client.transact(pb.EtcdTransaction(success=[pb.EtcdOperation(delete=pb.EtcdDelete(key=key))]))
    log_at(url).open("c1", 3)
    client.close()


def test_a_node_whose_key_was_deleted_is_fenced(url: str, log_at: LogAt) -> None:
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    client = EtcdClient(parsed(url))
    node = pb.EtcdDelete(key=Keys(parsed(url).prefix, "c1").node)
    client.transact(pb.EtcdTransaction(success=[pb.EtcdOperation(delete=node)]))
    client.close()
    with pytest.raises(Fenced, match="was deleted"):
        log.record([decision(epoch)])


def test_two_that_open_at_once_get_two_epochs(url: str, log_at: LogAt) -> None:
    logs = [log_at(url) for _ in range(4)]
    threads = [threading.Thread(target=log.open, args=("c1", n)) for n, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    opened = log_at(url).open("c1", 9)
    assert sorted(epoch.number for epoch in opened.lineage) == [1, 2, 3, 4]
    assert opened.epoch.number == 5


def test_pending_decisions_are_read_in_pages(url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_client, "_PAGE", 3)
    log = log_at(url)
    epoch = log.open("c1", 1).epoch
    decisions = [decision(epoch, n) for n in range(10)]
    log.record(decisions)
    assert log.pending() == decisions
    monkeypatch.setattr(etcd_log, "_KEPT", 0)
    log.done([each.xid for each in decisions], 100)
    monkeypatch.setattr(etcd_log, "_OVERFLOW", 4)
    assert log.overflow_ms() == 101


# ------------------------------------------------------------------------------------------------------- heartbeats


def test_a_node_that_says_nothing_for_its_lease_is_gone(url: str, log_at: LogAt) -> None:
    for node in ("c1", "c2"):
        log_at(url).open(node, 1)
    first, second = EtcdHeartbeats(url, 1.0), EtcdHeartbeats(url, 1.0)
    first.join("c1", "bank", 10)
    second.join("c2", "bank", 20)

    def shown() -> dict[str, bool]:
        return {row.node: row.beat != LEFT for row in first.beat()}

    assert shown() == {"c1": True, "c2": True}
    eventually(lambda: shown() == {"c1": True, "c2": False}, 60)
    second.beat()  # it was asleep
    assert shown() == {"c1": True, "c2": True}
    first.close()
    second.close()


def test_a_node_shows_itself_again_where_its_keys_have_gone(
    url: str, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Etcd was restored, or an answer was lost when the lease was new."""
    log_at(url).open("c1", 1)
    beats = EtcdHeartbeats(url, 1.0)
    monkeypatch.setattr(etcd_client, "_CALL_S", 0.0)
    show = EtcdClient.transact
    monkeypatch.setattr(EtcdClient, "transact", lambda *_: (_ for _ in ()).throw(EtcdFull("no space")))
    with pytest.raises(LogError):
        beats.join("c1", "bank", 10)
    monkeypatch.setattr(EtcdClient, "transact", show)
    monkeypatch.undo()
    beats.beat()
    assert [row.beat != LEFT for row in beats.beat()] == [True]
    keys = Keys(parsed(url).prefix)
    for prefix in (keys.alive, keys.members):
        gone = pb.EtcdOperation(delete=pb.EtcdDelete(key=prefix + b"c1"))
        beats._client.transact(pb.EtcdTransaction(success=[gone]))
        beats.beat()
        assert [row.beat != LEFT for row in beats.beat()] == [True]
    beats.close()


def test_heartbeats_leave_no_history(url: str, log_at: LogAt, etcd: EtcdCluster) -> None:
    log_at(url).open("c1", 1)
    beats = EtcdHeartbeats(url, 1.0)
    beats.join("c1", "bank", 10)
    client = EtcdClient(parsed(url))

    def versions() -> int:
        (kvs,) = client.read(under(f"{parsed(url).prefix}/".encode()))
        return max(each.mod_revision for each in kvs)

    before = versions()
    for _ in range(20):
        beats.beat()
    assert versions() == before
    beats.close()
    client.close()


# ------------------------------------------------------------------------------------------- rights, TLS, versions


@pytest.mark.proof
def test_a_user_with_a_password_and_rights_to_the_logs_keys(
    own_etcd: EtcdCluster, log_at: LogAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = own_etcd.control
    control("user", "add", "root:top")
    control("user", "grant-role", "root", "root")
    control("user", "add", "joe:s@crt")
    control("role", "add", "txrpc")
    control("role", "grant-permission", "--prefix=true", "txrpc", "readwrite", "txrpc/")
    control("user", "grant-role", "joe", "txrpc")
    control("auth", "enable")
    log = log_at(own_etcd.url(login="joe:s%40crt@"))
    epoch = log.open("c1", 1).epoch
    first = decision(epoch)
    assert log.record([first]) == 1
    control("--user=root:top", "user", "add", "ann:x")  # every token of before is stale
    assert log.record([decision(epoch)]) == 2
    log._client._token = "no.1"
    log.done([first.xid], 2_000)
    control("--user=root:top", "role", "revoke-permission", "--prefix=true", "txrpc", "txrpc/")
    with pytest.raises(NotRecorded, match="permission denied: give the user the right to read and write"):
        log.record([decision(epoch)])
    for login, said in (
        ("", "user name is empty: put USER:PASSWORD@ into"),
        ("joe:wrong@", "authentication failed.*: correct the user and password"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            log_at(own_etcd.url(login=login)).open("c2", 1)


@pytest.mark.proof
def test_tls(tmp_path: Path, log_at: LogAt) -> None:
    if not programs():
        pytest.skip("no etcd")
    authority = trustme.CA()
    shown = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca")
    shown.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    shown.private_key_pem.write_to_path(tmp_path / "key")
    files = {part: str(tmp_path / part) for part in ("ca", "cert", "key")}
    with EtcdCluster(1, files=files) as cluster:
        log = log_at(cluster.url())
        assert log.record([decision(log.open("c1", 1).epoch)]) == 1
        with pytest.raises(ConfigurationError, match="cannot open"):
            log_at(cluster.url().partition("?")[0]).open("c2", 1)


@pytest.mark.proof
@pytest.mark.skipif(len(programs()) < 2, reason="no etcd of a second version")
def test_another_version(log_at: LogAt) -> None:
    with EtcdCluster(program=programs()[1]) as cluster:
        log = log_at(cluster.url())
        epoch = log.open("c1", 1).epoch
        decisions = [decision(epoch, n) for n in range(200)]
        assert log.record(decisions) == 200
        log.done([each.xid for each in decisions], 1_000)
        assert log.forget(2_000, 500) == 200
        log.bind({"bank": "7/1"}, {"shop": ""})
        beats = EtcdHeartbeats(cluster.url(), 1.0)
        beats.join("c1", "bank", 1)
        assert [row.node for row in beats.beat()] == ["c1"]
        beats.leave()
        beats.close()
        assert log_at(cluster.url()).open("c1", 2).lineage == {epoch: 200}


@pytest.mark.proof
@pytest.mark.timeout(180)
def test_an_etcd_that_is_full_and_is_given_space_again(log_at: LogAt) -> None:
    """What it took is in the log, what it refused is not, and nothing is left uncertain."""
    if not programs():
        pytest.skip("no etcd")
    with EtcdCluster(1, quota_backend_bytes=str(4 * 1024 * 1024)) as cluster:
        log = log_at(cluster.url())
        epoch = log.open("c1", 1).epoch
        taken: list[Decision] = []
        with pytest.raises(NotRecorded, match="space exceeded: compact and defragment etcd"):
            for n in range(500):
                taken.append(sized(decision(epoch, n), 120_000))
                log.record(taken[-1:])
        refused = taken.pop()
        assert set(log.pending()) == set(taken)
        assert log.outcome(refused.xid) is None
        cluster.control("defrag")
        cluster.control("alarm", "disarm")
        with pytest.raises(LogError):  # there is no space still
            log.done([each.xid for each in taken], 1_000)
        # All but a few: how far etcd goes beyond its quota depends on how fast it is.
        for each in taken[:-5]:
            cluster.control("del", f"txrpc/pending/c1/{each.xid}")
        revision = json.loads(cluster.control("endpoint", "status", "--write-out=json"))[0]["Status"]["header"][
            "revision"
        ]
        cluster.control("compact", str(revision), "--physical=true")
        cluster.control("defrag")
        cluster.control("alarm", "disarm")
        assert log.record([refused]) == len(taken) + 1


# -------------------------------------------------------------------------------------------------------- the URL


@pytest.mark.parametrize(
    ("text", "endpoints", "prefix", "location"),
    [
        ("etcd://h1", ("h1:2379",), "txrpc", "etcd://h1:2379/txrpc"),
        ("etcd://h1:1,h2:2,[::1]:3/a/b/", ("h1:1", "h2:2", "[::1]:3"), "a/b", "etcd://h1:1,h2:2,[::1]:3/a/b"),
        ("etcd://joe:s%40crt@h1/x", ("h1:2379",), "x", "etcd://h1:2379/x"),
        ("etcds://h1:1?ca=/etc/ca", ("h1:1",), "txrpc", "etcds://h1:1/txrpc"),
    ],
)
def test_urls(text: str, endpoints: tuple[str, ...], prefix: str, location: str) -> None:
    url = parsed(text)
    assert (url.endpoints, url.prefix, url.location) == (endpoints, prefix, location)
    if "joe" in text:
        assert (url.user, url.password) == ("joe", "s@crt")
        assert "s@crt" not in repr(url)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("etcd:h1", "a log in etcd is etcd://HOST:2379"),
        ("etcd://", "'' is no member of etcd"),
        ("etcd://h1:0", "'h1:0' is no member"),
        ("etcd://h1:99999", "no member"),
        ("etcd://h1,,h2", "no member"),
        ("etcd://h1,h1:2379", "is named twice"),
        ("etcd://joe:secret@h 1", "'h 1' is no member"),
        ("etcd://h1?ca=x", "ca belong to TLS: write etcds://"),
        ("etcds://h1?cert=x", "cert and key of a log in etcd belong together"),
        ("etcds://h1?colour=x", "has no setting 'colour'"),
        ("etcds://h1?ca=/no/such/file", "ca of the log in etcd: cannot read /no/such/file"),
    ],
)
def test_rule_15_bad_urls(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        EtcdLog(text)
    assert said in str(raised.value)
    assert "secret" not in str(raised.value)


def test_an_etcd_that_is_not_there_is_named(log_at: LogAt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_client, "_CALL_S", 0.5)
    with pytest.raises(
        ConfigurationError, match=r"cannot open the decision log etcd://127\.0\.0\.1:1/txrpc: .*: start etcd"
    ):
        log_at("etcd://joe:secret@127.0.0.1:1").open("c1", 1)
