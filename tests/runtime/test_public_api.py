"""What users hold: one object for nested blocks, and one clear error for each mistake.  Its types are in `public_types`."""

from __future__ import annotations

from typing import Any

import pytest

import txrpc
import txrpc.aio
from tests.runtime.memory_resource import MemoryResource
from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager


@pytest.mark.usefixtures("manager")
def test_a_nested_block_has_the_object_of_the_block_around_it(notebook: MemoryResource) -> None:
    with txrpc.transaction() as outer:
        assert txrpc.current_transaction() is outer
        with txrpc.transaction(rollback_for=[KeyError], no_rollback_for=[ValueError]) as inner:
            assert inner is outer
            assert txrpc.current_transaction() is outer
            notebook.write("one")
        with pytest.raises(ValueError, match="not so bad"), txrpc.transaction(no_rollback_for=[ValueError]):
            raise ValueError("not so bad")
        with txrpc.transaction(propagation="requires_new") as other:
            assert other is not outer
        assert txrpc.current_transaction() is outer
    assert notebook.lines == ["one"]
    assert isinstance(outer, txrpc.RootTransaction)


_SYNC: Any = txrpc
_AIO: Any = txrpc.aio


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: _SYNC.transaction("5"), "timeout is a positive number of seconds, not '5'"),
        (lambda: _SYNC.transaction(True), "timeout is a positive number"),
        (lambda: _SYNC.transactional(retry=ValueError)(print), "retry is a txrpc.Retry, True, or how often"),
        (lambda: _SYNC.transactional(5), "decorates a function; timeouts and the like are named: timeout=5"),
        (lambda: _SYNC.transactional(MemoryResource), "MemoryResource is a class: decorate its methods"),
        (lambda: _SYNC.transactional(classmethod(print)), "write @classmethod above @transactional"),
        (lambda: _AIO.transactional(staticmethod(print)), "write @staticmethod above @transactional"),
        (lambda: _SYNC.connect("h:1", commit_timeout="5"), "commit_timeout is a positive number of seconds, not '5'"),
        (lambda: _SYNC.transaction(propagation="sometimes"), "propagation is one of REQUIRED,"),
    ],
)
def test_a_mistake_is_one_clear_usage_error(mistake: Any, words: str) -> None:
    with pytest.raises(txrpc.UsageError) as caught:
        mistake()
    assert words in str(caught.value)


def test_an_address_with_a_scheme_is_refused_with_what_is_meant() -> None:
    with pytest.raises(txrpc.ConfigurationError, match="'host:port', without a scheme, not 'http://localhost:7654'"):
        txrpc.connect("http://localhost:7654")


def test_a_manager_shows_what_users_need_and_its_status(manager: Client) -> None:
    public = TransactionManager(manager)
    names = {name for name in dir(public) if not name.startswith("_")}
    assert names == {"begin", "close", "group", "outcome", "process", "status", "transaction"}
    status = public.status()
    assert status == txrpc.ManagerStatus(
        status.coordinator, {"notebook": "", "second": ""}, {"nowhere:1": "no session"}
    )
    assert status.ready is (status.coordinator is not None)
    assert not txrpc.ManagerStatus("c1", {"bank": "away"}, {"a:1": ""}).ready
    assert repr(public) == f"<TransactionManager {manager.state.process} of group default>"


def test_begin_refuses_a_timeout_that_is_no_number(manager: Client) -> None:
    begin: Any = txrpc.begin
    with pytest.raises(txrpc.UsageError, match="timeout is a positive number of seconds, not '5'"):
        begin("5")
    assert txrpc.current_transaction() is None


def test_only_the_root_learns_how_a_transaction_ends(manager: Client) -> None:
    with txrpc.transaction() as tx:
        events: list[txrpc.TransactionEvent] = []
        tx.after_completion(events.append)
    assert [event.outcome for event in events] == [txrpc.Outcome.COMMITTED]
    with pytest.raises(txrpc.UsageError, match="has ended already"):
        tx.after_completion(events.append)
