"""The coordinator's configuration: precedence, and one clear sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from txrpc._coordinator.config import _RANGES, FIELDS, CoordinatorConfig, load
from txrpc._protocol.messages import Owner, Welcome
from txrpc._wire.codec import decode_coordinator_batch, encode_from_coordinator
from txrpc.errors import ConfigurationError
from txrpc.ids import Epoch


def test_defaults_are_valid() -> None:
    config = load({}, {}, None)
    assert config == CoordinatorConfig()
    assert config.address() == ("127.0.0.1", 7400)
    assert config.limits().max_branches == config.max_branches


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('node = "file"\nmax_branches = 5\nretention_s = 7\nlog_level = "debug"\n')
    environment = {"TXRPC_NODE": "env", "TXRPC_MAX_BRANCHES": "6", "OTHER": "x"}
    config = load({"node": "flag"}, environment, str(file))
    assert (config.node, config.max_branches, config.retention_s, config.log_level) == ("flag", 6, 7.0, "debug")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"listen": "nowhere"}, "HOST:PORT"),
        ({"listen": "h:99999"}, "HOST:PORT"),
        ({"node": "it's"}, "node name"),
        ({"group": "g" * 30}, "at most 24"),
        ({"max_branches": "many"}, "--max-branches: 'many' is not a whole number"),
        ({"max_branches": "0"}, "max_branches is 0"),
        ({"max_timeout_s": "-1"}, "max_timeout_s"),
        ({"max_timeout_s": "nan"}, "max_timeout_s"),
        ({"max_timeout_s": "1e306"}, "from 0.001 to 86,400"),
        ({"max_timeout_s": "0"}, "max_timeout_s"),
        ({"retention_s": "inf"}, "retention_s is inf"),
        ({"retention_s": "1e300"}, "retention_s"),
        ({"retention_s": "-1"}, "retention_s"),
        ({"shutdown_grace_s": "-0.1"}, "shutdown_grace_s"),
        ({"in_doubt_warn_s": "-1"}, "in_doubt_warn_s"),
        ({"takeover_s": "0.5"}, "takeover_s is 0.5; it must be 1.0 at least"),
        ({"takeover_s": "-1"}, "takeover_s"),
        ({"ack_wait_s": "0"}, "ack_wait_s"),
        ({"keepalive_s": "0"}, "keepalive_s"),
        ({"keepalive_timeout_s": "-1"}, "keepalive_timeout_s"),
        ({"max_branches": "1000000000000"}, "from 1 to 10,000"),
        ({"max_sessions": "0"}, "max_sessions"),
        ({"max_transactions": "0"}, "max_transactions"),
        ({"max_message_bytes": "100"}, "from 16,384"),
        ({"max_message_bytes": "4294967296"}, "max_message_bytes"),
        ({"max_remembered": "-5"}, "max_remembered"),
        ({"log_level": "loud"}, "debug, info, warning, error"),
        ({"log_format": "xml"}, "logfmt, json"),
    ],
)
def test_a_bad_value_is_named(flags: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load(flags, {}, None)


def test_bad_values_name_their_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TXRPC_MAX_BRANCHES: 'x'"):
        load({}, {"TXRPC_MAX_BRANCHES": "x"}, None)
    file = tmp_path / "c.toml"
    for text, says in (
        ("max_branchs = 3", "no option 'max_branchs'"),
        ("max_branches = true", "True is not a whole number"),
        ("max_branches = 2.5", "2.5 is not a whole number"),
        ("node = 3", "3 is not a text"),
        ("node = ", "not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=says) as caught:
            load({}, {}, str(file))
        assert "c.toml" in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot read"):
        load({}, {}, str(tmp_path / "absent.toml"))


def test_every_option_says_what_it_is() -> None:
    for name, option in FIELDS.items():
        assert len(option.metadata["text"]) > 10, name


def test_every_number_has_a_range_and_its_ends_are_allowed() -> None:
    numbers = {name for name, option in FIELDS.items() if not isinstance(option.default, str)}
    assert set(_RANGES) == numbers
    for end in (0, 1):
        alone = {name: str(ends[end]) for name, ends in _RANGES.items() if not name.endswith("_quorum")}
        config = load(alone, {}, None)
        limits = config.limits()
        sizes = (limits.max_timeout_ms, limits.max_branches, limits.max_message_bytes)
        welcome = Welcome(Owner("c1", Epoch.make(1, 1)), 1, *sizes)
        assert decode_coordinator_batch(encode_from_coordinator("c1", [welcome])) == [("c1", welcome)]


# ----------------------------------------------------------------------------------------------- a group

THREE = "c1=a:1,c2=b:1,c3=c:1"


def test_a_group_is_named_by_its_members_and_its_disk_is_the_log_file() -> None:
    config = load(
        {"members": THREE, "node": "c2", "log": "sqlite:////var/lib/txrpc/disk.db", "write_quorum": "3"}, {}, None
    )
    assert config.group_members().addresses == {"c1": "a:1", "c2": "b:1", "c3": "c:1"}
    assert (config.group_members().quorums.reads, config.group_members().quorums.writes) == (2, 3)
    assert config.disk_file() == "/var/lib/txrpc/disk.db"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"members": THREE, "node": "c9"}, "the members are c1, c2, c3; this node, 'c9', is none of them"),
        ({"members": "c1"}, "NODE=HOST:PORT"),
        ({"members": THREE, "log": "postgresql://db/txrpc"}, "each member of a group has a disk of its own"),
        ({"members": THREE, "log": "etcd://h1"}, "each member of a group has a disk of its own"),
        ({"members": THREE, "takeover_s": 0}, "take each other over"),
        ({"members": THREE, "read_quorum": 1}, "together they must be more than 3"),
        ({"members": THREE, "write_quorum": 4}, "not possible with 3 acceptors"),
        ({"members": THREE, "tls_peer_ca": "ca.pem"}, "a group with TLS needs"),
        ({"members": THREE, "tls_certificate": "c.pem", "tls_key": "c.key"}, "a group with TLS needs"),
        ({"read_quorum": 1}, "belong to a group: name its members"),
        ({"write_quorum": -1}, "from 0 to 1,000"),
    ],
)
def test_a_group_that_cannot_be_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load(given, {}, None)
