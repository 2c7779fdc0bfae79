"""Options of the user's side, as frozen values that check themselves."""

from __future__ import annotations

from dataclasses import dataclass

from txrpc.errors import ConfigurationError

__all__ = ["DEFAULTS", "SessionOptions"]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a process keeps its session with the coordinator.  Times are in seconds.

    Raises `ConfigurationError`, naming the field, if a value cannot work.
    """

    connect_timeout_s: float = 5.0
    """How long `connect` waits for the first session before it goes on in the background; also the limit of one attempt, from
    dialling to the coordinator's Welcome."""
    backoff_initial_s: float = 0.1
    """The longest wait before the second attempt; it doubles with every further one.  The waits are random, from 0."""
    backoff_max_s: float = 1.0
    """The longest wait between two attempts, and so about how late a coordinator that is back is noticed.  A session that lasted
    longer than this counts as healthy: after it the first attempt is made at once, and the waits begin anew."""
    keepalive_s: float = 10.0
    """Silence after which the coordinator is probed.  Keep it above the coordinator's own limit for probes, 1 s."""
    keepalive_timeout_s: float = 5.0
    """A probe without an answer for this long ends the session: the coordinator, or the way to it, is frozen or gone."""
    max_batch: int = 500
    """Messages that go out together at most."""
    max_message_bytes: int = 16 * 1024 * 1024
    """The largest batch that is taken from the coordinator, and that is sent unless the coordinator's own limit is lower."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "backoff_initial_s", "backoff_max_s", "keepalive_s", "keepalive_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be a positive number of seconds")
        if self.backoff_max_s < self.backoff_initial_s:
            raise ConfigurationError(
                f"backoff_max_s is {self.backoff_max_s!r}; it must be at least backoff_initial_s, {self.backoff_initial_s!r}"
            )
        if self.max_batch < 1:
            raise ConfigurationError(f"max_batch is {self.max_batch}; it must be at least 1")
        if not _BYTES_MIN <= self.max_message_bytes < 1 << 31:
            raise ConfigurationError(
                f"max_message_bytes is {self.max_message_bytes}; it must be at least {_BYTES_MIN} and below 2 GiB"
            )


_BYTES_MIN = 4096
DEFAULTS = SessionOptions()
