"""Which resources of a process are ready, and what keeps the others: a process serves with the databases that are healthy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from txrpc._protocol.messages import ResourceInfo
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.ids import RegisterId

__all__ = ["Starting"]

logger = logging.getLogger("txrpc.client")

_NOT_YET = "its database has not answered yet"


class Starting:
    """What each resource said at its last start.  Not thread-safe: its manager's lock guards every change."""

    def __init__(self, resources: Mapping[str, Any]) -> None:
        self._infos = {name: ResourceInfo(name, resource.kind, "", _NOT_YET) for name, resource in resources.items()}
        self._errors: dict[str, BaseException] = {}
        self._ready_since: dict[str, int] = {}
        self.version = 0
        """Goes up whenever the coordinator has something new to hear."""

    @property
    def infos(self) -> tuple[ResourceInfo, ...]:
        """All resources, as a Hello announces them."""
        return tuple(self._infos.values())

    def trouble(self, name: str) -> str:
        """Return what keeps resource *name* from being used; "" if it is ready."""
        return self._infos[name].trouble

    def ready_since(self, name: str) -> int:
        """Return the version in which resource *name* has become the database that it is."""
        return self._ready_since.get(name, 0)

    def register(self, name: str) -> RegisterId | None:
        """Return where resource *name* decides, if it does and is ready."""
        return self._infos[name].register

    def reopened(self, name: str, register: RegisterId) -> bool:
        """Take where resource *name* decides from now on; return whether that is news."""
        before = self._infos[name]
        if before.trouble or before.register == register:
            return False
        self._infos[name] = dataclasses.replace(before, register=register)
        self.version += 1
        return True

    def took(self, name: str, found: object) -> bool:
        """Take what `Resource.start` of *name* returned or raised; return whether that is news."""
        if isinstance(found, ResourceInfo):
            found = self._twins(found) or found
        elif not isinstance(found, BaseException):
            found = ConfigurationError(f"resource {name!r}: start() returns a ResourceInfo, not {type(found).__name__}")
        before = self._infos[name]
        if isinstance(found, ResourceInfo):
            self._errors.pop(name, None)
            info = found
        else:
            self._errors[name] = found
            trouble = str(found) or type(found).__name__
            info = dataclasses.replace(before, identity="", trouble=trouble, register=None)
        self._infos[name] = info
        self.version += info != before
        if info.identity != before.identity:
            self._ready_since[name] = self.version
        return info != before

    def check(self) -> None:
        """After the first attempts: log what time may mend, and raise what it will not, with all troubles in one message."""
        if all(isinstance(error, ResourceUnavailable) for error in self._errors.values()):
            for info in self._infos.values():
                if info.trouble:
                    logger.warning("resource %r is tried again in the background: %s", info.name, info.trouble)
            return
        if len(self._errors) == 1:
            raise next(iter(self._errors.values()))
        text = "; ".join(info.trouble for info in self._infos.values() if info.name in self._errors)
        raise ConfigurationError(text) from next(
            error for error in self._errors.values() if not isinstance(error, ResourceUnavailable)
        )

    def _twins(self, info: ResourceInfo) -> ConfigurationError | None:
        """Return why a transaction that used both would wait for itself, or None."""
        others = [
            each.name for each in self._infos.values() if each.identity == info.identity and each.name != info.name
        ]
        if not info.identity or not others:
            return None
        first, second = (name for name in self._infos if name in (info.name, others[0]))
        return ConfigurationError(
            f"resources {first!r} and {second!r} are one database ({info.identity}): give connect one of them, or a "
            "transaction that uses both waits for itself"
        )
