"""One click option a field of the coordinator's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from txrpc._coordinator.config import FIELDS

__all__ = ["config_options"]


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give *command* every option of `txrpc._coordinator.config.CoordinatorConfig`, as text that is converted there."""
    for name, option in reversed(FIELDS.items()):
        flag = "--" + name.replace("_", "-")
        text = f"{option.metadata['text']}  [default: {option.default if option.default != '' else 'none'}]"
        command = click.option(flag, name, default=None, metavar="VALUE", help=text)(command)
    return command
