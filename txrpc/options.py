"""Options of the user's side, as frozen values that check themselves."""

from __future__ import annotations

from dataclasses import dataclass

from txrpc.errors import ConfigurationError

__all__ = ["DEFAULTS", "SessionOptions"]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a process keeps its session with the coordinator.  Times are in seconds."""

    connect_timeout_s: float = 5.0
    """How long `connect` waits for the first session before it goes on in the background; also the limit of one attempt."""
    backoff_initial_s: float = 0.1
    """The longest wait before the second attempt; it doubles with every further one.  The waits are random, from 0."""
    backoff_max_s: float = 5.0
    """The longest wait between two attempts."""
    keepalive_s: float = 10.0
    """Silence after which the coordinator is probed."""
    keepalive_timeout_s: float = 5.0
    """A probe without an answer for this long ends the session: the coordinator, or the way to it, is frozen or gone."""
    max_batch: int = 500
    """Messages that go out together at most."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "backoff_initial_s", "backoff_max_s", "keepalive_s", "keepalive_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be a positive number of seconds")
        if self.max_batch < 1:
            raise ConfigurationError(f"max_batch is {self.max_batch}; it must be at least 1")


DEFAULTS = SessionOptions()
