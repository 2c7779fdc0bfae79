"""Conversations as generators: one body, two shells.

A flow yields what it wants done, as a `Call` of a function with arguments, and receives the result or the exception.  `run` makes
the call and blocks; `arun` makes it and awaits.  Whatever a flow calls has one name, synchronous and asyncio (a resource's
verbs, a client's waits), so the flow does not know which it is.  A step costs about a microsecond.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, TypeVar

__all__ = ["Call", "Flow", "arun", "run"]

_R = TypeVar("_R")

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its positional arguments."""

Flow = Generator[Call, Any, _R]


def run(flow: Flow[_R]) -> _R:
    """Drive *flow* to its end in the calling thread."""
    send, argument = flow.send, None
    while True:
        try:
            function, arguments = send(argument)
        except StopIteration as stop:
            result: _R = stop.value
            return result
        try:
            send, argument = flow.send, function(*arguments)
        except BaseException as error:
            send, argument = flow.throw, error


async def arun(flow: Flow[_R]) -> _R:
    """Drive *flow* to its end, awaiting each call."""
    send, argument = flow.send, None
    while True:
        try:
            function, arguments = send(argument)
        except StopIteration as stop:
            returned: _R = stop.value
            return returned
        try:
            result = function(*arguments)
            # The poll of a synchronous call that was made inside an asyncio transaction has nothing to await.
            send, argument = flow.send, await result if inspect.isawaitable(result) else result
        except BaseException as error:
            send, argument = flow.throw, error
