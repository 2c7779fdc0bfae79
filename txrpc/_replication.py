"""Whether PostgreSQL made something durable as its owner configured it (rule 22).

A COMMIT or PREPARE that waits for a synchronous standby and is cancelled has taken effect on the primary; the server says so in a
warning, and answers as if all were well.  A fail-over may lose it.  So code that needs durability listens for that warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["CANCELLED", "deaf", "watch_replication"]

CANCELLED: Final = (
    "the wait for a synchronous standby was cancelled: it has taken effect on the primary, and a fail-over may lose it"
)
_FUNCTION: Final = "SyncRepWaitForLSN"
"""Where in the server the warning comes from: its words are in the server's language."""
_WORDS: Final = "wait for synchronous replication"
_ENGLISH: Final = re.compile(r"(C|POSIX|en)\b|en_|English|$")
"""Values of lc_messages, on any system, under which the server speaks English."""


def deaf(driver: str, lc_messages: str) -> str:
    """Return why `watch_replication` may miss a warning, in one sentence; "" if it does not.

    *driver*: its name.  *lc_messages*: the server's setting.
    """
    if driver != "psycopg2" or _ENGLISH.match(lc_messages):
        return ""
    return (
        f"psycopg2 passes on the server's warnings as words alone, and lc_messages is {lc_messages!r}: that a wait for a "
        "synchronous standby was cancelled would go unnoticed, and a fail-over could lose what counts as durable; use the driver "
        "psycopg, or let an administrator ALTER ROLE ... SET lc_messages = 'C'"
    )


@contextmanager
def watch_replication(driver: Any) -> Iterator[list[str]]:
    """While the block runs, collect such warnings of *driver*, a connection of psycopg, psycopg2 or asyncpg."""
    heard: list[str] = []
    if hasattr(driver, "add_notice_handler"):  # psycopg, both kinds

        def noticed(diagnostic: Any) -> None:
            if diagnostic.source_function == _FUNCTION:
                heard.append(CANCELLED)

        driver.add_notice_handler(noticed)
        try:
            yield heard
        finally:
            driver.remove_notice_handler(noticed)
    elif hasattr(driver, "add_log_listener"):  # asyncpg

        def logged(_connection: Any, message: Any) -> None:
            if getattr(message, "server_source_function", None) == _FUNCTION:
                heard.append(CANCELLED)

        driver.add_log_listener(logged)
        try:
            yield heard
        finally:
            if not driver.is_closed():
                driver.remove_log_listener(logged)
    elif hasattr(driver, "notices"):  # psycopg2 has the words alone, in the language of lc_messages
        driver.notices = listening = _Notices(driver.notices)
        try:
            yield heard
        finally:
            driver.notices = list(listening)
        heard += [CANCELLED for notice in listening.heard if _WORDS in notice]
    else:
        yield heard


class _Notices(list[str]):
    """What psycopg2 appends to, and SQLAlchemy empties."""

    def __init__(self, before: Iterable[str]) -> None:
        super().__init__(before)
        self.heard: list[str] = []

    def append(self, notice: str) -> None:
        self.heard.append(notice)
        super().append(notice)
