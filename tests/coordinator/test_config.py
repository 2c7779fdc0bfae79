"""The coordinator's configuration: precedence, and one clear sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from txrpc.coordinator.config import FIELDS, CoordinatorConfig, load
from txrpc.errors import ConfigurationError


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
        ({"retention_s": "inf"}, "finite"),
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
