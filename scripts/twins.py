"""Write the synchronous twins of asyncio modules, or with --check say whether the committed ones are what would come out.

Each pair is written once, as the asyncio half, which says more: where it may be suspended.  The synchronous half follows from it
by `RULES`, and by the pair's own replacements for what has no counterpart.  Pairs that stand on different libraries (threads and
tasks, grpc and grpc.aio) are written by hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUFF = str(Path(sys.executable).with_name("ruff"))

RULES = [
    (r"\basync (def|with|for)\b", r"\1"),
    (r"await ([\w.]+)\.run_sync\(\s*([\w.]+)(, )?", r"\2(\1\3"),
    (r"\bawait ", ""),
    (r"\.sync_(engine|session)\b", ""),
    (r"\.sync_transaction\b", ""),
    (r"\barun\b", "run"),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"^import asyncio$", "import time"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\benter_async_context\b", "enter_context"),
    (r"\bAbstractAsyncContextManager\b", "AbstractContextManager"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAwaitable\[None\]", "None"),
    (r"\ba(send|throw|close)\b", r"\1"),
    (r"\b(\w+)_async\b", r"\1"),
    (
        r"\bsqlalchemy\.ext\.asyncio import AsyncConnection, AsyncEngine, AsyncSession\b",
        "sqlalchemy import Connection, Engine",
    ),
    (r"\b([Aa])n (`?)Async(?=[A-Z])", r"\1 \2"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\btxrpc\.aio\b", "txrpc"),
]
"""Applied in this order to the whole text, docstrings and comments included."""


@dataclass(frozen=True)
class Pair:
    """One module and its twin; `replacements` are made first, and each must be found exactly once."""

    source: str
    target: str
    replacements: tuple[tuple[str, str], ...] = field(default=())


_AWAITED = "                    if asyncio.iscoroutine(result):\n                        await result\n"

PAIRS = [
    Pair(
        "txrpc/_client/manager_async.py",
        "txrpc/_client/manager.py",
        (
            ("An asyncio process's", "A synchronous process's"),
            ("It belongs to the event loop that it was connected in.", "Safe to use from any thread."),
            ("async with await txrpc.aio.connect", "with txrpc.connect"),
        ),
    ),
    Pair(
        "txrpc/_client/transaction_async.py",
        "txrpc/_client/transaction.py",
        (
            ("transaction objects of asyncio programs", "transaction objects of synchronous programs"),
            ("from any task, once", "from any thread, once"),
            ("                    result = hooks.pop(0)", "                    hooks.pop(0)"),
            ("                    result = hook(event)", "                    hook(event)"),
            (f"{_AWAITED}        except B", "        except B"),
            (f"{_AWAITED}                except E", "                except E"),
        ),
    ),
    Pair(
        "txrpc/_client/transactional_async.py",
        "txrpc/_client/transactional.py",
        (
            ("for asyncio programs", "for synchronous programs"),
            ("An asynchronous context manager", "A context manager"),
            ('    entry_point = "txrpc.aio"', '    entry_point = "txrpc"'),
            (
                "Run a coroutine function, or asynchronous generator function, inside",
                "Run a function, method or generator function inside",
            ),
            (
                "when it decorates anything else: that is `txrpc.transactional`'s",
                "when it decorates a coroutine function: that is `<aio>.transactional`'s",
            ),
            ("AsyncIterator[Any]:", "Generator[Any, Any, Any]:"),
            ("import AsyncIterator, Callable", "import Callable, Generator"),
            ("StopAsyncIteration:\n", "StopIteration as stop:\n                        result = stop.value\n"),
            ("        await scope.close(None)\n", "        scope.close(None)\n        return result\n"),
        ),
    ),
    Pair(
        "txrpc/sql/resource_async.py",
        "txrpc/sql/resource.py",
        (
            (
                "Give it to `txrpc.aio.connect`, on one event loop.",
                "Safe to use from any number of threads.  Give it to `txrpc.connect`.",
            ),
            ("from sqlalchemy.engine import Connection\n", ""),
            (
                "import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress",
                "import AbstractContextManager, ExitStack, contextmanager, suppress",
            ),
            (
                "from sqlalchemy.exc import TimeoutError as PoolTimeout\n",
                "from sqlalchemy.exc import TimeoutError as PoolTimeout\nfrom sqlalchemy.orm import Session\n",
            ),
            ("AsyncEngine(side)\n", "side\n"),
            ("(DBAPIError, OSError)", "DBAPIError"),
            ("import AsyncIterator, Awaitable, Callable, Mapping", "import Callable, Iterator, Mapping"),
        ),
    ),
    Pair(
        "txrpc/sql/decider_async.py",
        "txrpc/sql/decider.py",
        (("For `AsyncEngine`s.", "For `Engine`s."),),
    ),
    Pair(
        "txrpc/sql/kept_async.py",
        "txrpc/sql/kept.py",
        (("from sqlalchemy.ext.asyncio import AsyncConnection", "from sqlalchemy.engine import Connection"),),
    ),
]


def twin(pair: Pair) -> str:
    """Return the text of a pair's synchronous half."""
    text = (ROOT / pair.source).read_text()
    for old, new in pair.replacements:
        if text.count(old) != 1:
            raise SystemExit(f"{pair.source}: {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    text = text.replace("<aio>", "txrpc.aio")
    head, line, rest = text.partition("\nfrom __future__")
    text = f"{head}\n# Written by scripts/twins.py from {Path(pair.source).name}: change that one.\n{line}{rest}"
    for command in (["check", "--fix", "--quiet", "--select", "I,F401,UP"], ["format", "--quiet"]):
        text = subprocess.run(
            [RUFF, *command, "--stdin-filename", str(ROOT / pair.target), "-"],
            input=text,
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    return text


def main() -> int:
    """See the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the synchronous twins of asyncio modules.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything would change")
    check = parser.parse_args().check
    stale = 0
    for pair in PAIRS:
        text, target = twin(pair), ROOT / pair.target
        if target.exists() and target.read_text() == text:
            continue
        stale += 1
        print(f"{'stale, run make twins' if check else 'wrote'}: {pair.target}")
        if not check:
            target.write_text(text)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
