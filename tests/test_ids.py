"""Identifiers: what may end up in SQL text holds nothing that SQL could mistake."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.values import gids
from txrpc.errors import InvalidName
from txrpc.ids import (
    GROUP_MAX,
    NODE_MAX,
    RESOURCE_MAX,
    BranchId,
    Epoch,
    Gid,
    ParticipantId,
    RegisterId,
    Xid,
    check_name,
)


@pytest.mark.parametrize(
    "name",
    ["", "it's", 'a"b', "a b", "a;b", "a:b", "-a", "a-", ".a", "a\n", "é", "a" * 41, "a--b'", "\x00", "a/b", None, 5],
)
def test_names_that_are_too_long_or_hold_quotes_are_refused(name: object) -> None:
    with pytest.raises(InvalidName):
        check_name("resource", name, RESOURCE_MAX)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "A9", "bank-a", "orders.eu_1", "a" * 40])
def test_ordinary_names_are_allowed(name: str) -> None:
    assert check_name("resource", name, RESOURCE_MAX) == name


@given(st.text(max_size=50))
def test_whatever_is_allowed_needs_no_quoting(name: str) -> None:
    try:
        check_name("resource", name, RESOURCE_MAX)
    except InvalidName:
        return
    assert name.isascii()
    assert not set(name) & set("'\"\\;: \n\0")


@given(gids)
def test_a_gid_survives_its_text(gid: Gid) -> None:
    assert Gid.parse(str(gid)) == gid


def test_the_longest_gid_fits_into_postgresql() -> None:
    gid = Gid(
        "g" * GROUP_MAX,
        "n" * NODE_MAX,
        Epoch(2**63 - 1),
        Xid(bytes(16)),
        BranchId(bytes(8)),
        ParticipantId(bytes(8)),
        "r" * RESOURCE_MAX,
    )
    assert len(str(gid)) < 199


def test_the_longest_gid_under_a_register_fits_as_well() -> None:
    xid, branch, participant, register = (
        Xid(bytes(16)),
        BranchId(bytes(8)),
        ParticipantId(bytes(8)),
        RegisterId(bytes(24)),
    )
    gid = Gid("g" * GROUP_MAX, "", Epoch(0), xid, branch, participant, "r" * RESOURCE_MAX, register)
    assert len(str(gid)) == 188
    assert Gid.parse(str(gid)) == gid
    assert any(str(gid).startswith(prefix) for prefix in Gid.prefixes("g" * GROUP_MAX))
    assert (register.table, register.incarnation) == (bytes(16), bytes(8))


@given(st.text(max_size=200))
def test_other_peoples_identifiers_are_not_ours(text: str) -> None:
    found = Gid.parse(text)
    assert found is None or str(found) == text


@pytest.mark.parametrize(
    "change",
    [
        ("txrpc1", "txrpc2"),
        ("txrpc1", "txrpc3"),
        ("default", "de'fault"),
        ("default", ""),
        ("bank", "BANK:x"),
        ("0" * 32, "0" * 30),
        ("0" * 32, "G" * 32),
    ],
)
def test_a_gid_that_is_nearly_ours_is_not(change: tuple[str, str]) -> None:
    gid = Gid("default", "c1", Epoch.make(1, 1), Xid(bytes(16)), BranchId(bytes(8)), ParticipantId(bytes(8)), "bank")
    assert Gid.parse(str(gid).replace(*change, 1)) is None


def test_an_xid_is_a_uuid_version_7() -> None:
    import uuid

    xid = Xid.make(1_700_000_000_000, bytes(range(10)))
    as_uuid = uuid.UUID(str(xid))
    assert (as_uuid.version, as_uuid.variant) == (7, uuid.RFC_4122)
    assert xid.unix_ms == 1_700_000_000_000
    assert Xid.parse(str(as_uuid)) == xid == pickle.loads(pickle.dumps(xid))
    with pytest.raises(ValueError, match="16 bytes"):
        Xid(b"short")
    with pytest.raises(ValueError, match="ten random"):
        Xid.make(0, b"")


def test_epochs_order_by_number_and_differ_by_nonce() -> None:
    assert Epoch.make(1, 2**32 - 1) < Epoch.make(2, 0)
    assert Epoch.make(2, 1) != Epoch.make(2, 2)
    assert Epoch.make(7, 5).number == 7
    for number, nonce in ((0, 0), (2**31, 0), (1, 2**32), (1, -1)):
        with pytest.raises(ValueError, match="not an epoch"):
            Epoch.make(number, nonce)
