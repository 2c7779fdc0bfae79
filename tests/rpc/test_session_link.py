"""The parts that both sessions share, by themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.rpc.scripted import number_of, request
from txrpc._grpc.batches import Waiting, parse
from txrpc._grpc.link import Backoff
from txrpc._protocol import messages as m
from txrpc._wire.codec import decode_process_batch, encode_from_coordinator
from txrpc._wire.v1 import session_pb2
from txrpc.errors import BadMessage, ConfigurationError, LimitExceeded
from txrpc.options import SessionOptions

OPTIONS = SessionOptions(backoff_initial_s=0.1, backoff_max_s=1.0, max_batch=10)
LIMITS_S = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_waits_are_random_from_zero_and_grow_to_the_limit() -> None:
    waits = []
    for _ in range(300):
        backoff = Backoff(OPTIONS)
        waits.append([backoff.next_s(0) for _ in LIMITS_S])
    for limit_s, column in zip(LIMITS_S, zip(*waits, strict=True), strict=True):
        assert 0 <= min(column) < 0.1 * limit_s
        assert 0.9 * limit_s < max(column) <= limit_s
        assert 0.4 * limit_s < sum(column) / len(column) < 0.6 * limit_s


def test_waits_do_not_overflow_after_years(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    backoff = Backoff(OPTIONS)
    assert [backoff.next_s(0) for _ in range(5_000)][-1] == 1.0


def test_only_a_session_that_lasted_resets_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    backoff = Backoff(OPTIONS)
    assert [backoff.next_s(0.9) for _ in range(3)] == [0.1, 0.2, 0.4], "a coordinator that keeps throwing us out"
    assert backoff.next_s(1.1) == 0.0
    assert [backoff.next_s(0) for _ in range(2)] == [0.1, 0.2]
    assert backoff.next_s(1.1, at_once=False) == 0.1, "a coordinator that said goodbye"


def batch(waiting: Waiting) -> list[int]:
    data = waiting.take()
    assert len(data) <= waiting.max_bytes
    return [number_of(x) for _, x in decode_process_batch(session_pb2.ProcessBatch.FromString(data))]


def test_a_join_of_what_waits_is_a_batch_of_all_of_it() -> None:
    waiting = Waiting(OPTIONS)
    assert not waiting
    waiting.add(waiting.encode("c1", map(request, range(25))))
    assert [batch(waiting) for _ in range(3)] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert not waiting


@pytest.mark.parametrize("messages", [1, 2, 3])
def test_a_batch_fills_the_bytes_to_the_last_one(messages: int) -> None:
    waiting = Waiting(OPTIONS)
    encoded = waiting.encode("c1", map(request, range(1, 8)))
    [size] = {len(x) for x in encoded}
    for spare, expected in ((-1, max(1, messages - 1)), (0, messages), (1, messages)):
        waiting = Waiting(OPTIONS)
        waiting.max_bytes = max(size, messages * size + spare)
        waiting.add(encoded)
        assert len(batch(waiting)) == expected


def test_a_message_of_exactly_the_limit_is_sent() -> None:
    waiting = Waiting(OPTIONS)
    [data] = waiting.encode("c1", [request(1)])
    waiting.max_bytes = len(data)
    waiting.encode("c1", [request(1)])
    waiting.max_bytes -= 1
    with pytest.raises(LimitExceeded):
        waiting.encode("c1", [request(1)])


def test_random_bytes_are_a_bad_message_or_a_batch() -> None:
    generator = random.Random(7)
    bad = 0
    for _ in range(5_000):
        try:
            parse(generator.randbytes(generator.randrange(40)))
        except BadMessage:
            bad += 1
    assert bad > 4_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("connect_timeout_s", 0),
        ("connect_timeout_s", float("nan")),
        ("connect_timeout_s", float("inf")),
        ("backoff_initial_s", -1),
        ("backoff_max_s", 0.01),
        ("keepalive_s", 0),
        ("keepalive_timeout_s", -0.1),
        ("max_batch", 0),
        ("max_message_bytes", 100),
        ("max_message_bytes", 1 << 31),
    ],
)
def test_options_that_cannot_work_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=field):
        SessionOptions(**{field: value})


def test_a_goodbye_behind_other_messages_lets_them_be_delivered_first() -> None:
    said: list[m.FromCoordinator] = [m.Tick(1), m.GoAway("a", "b", retry=True)]
    assert parse(encode_from_coordinator("c1", said).SerializeToString()) == [("c1", message) for message in said]
