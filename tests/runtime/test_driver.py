"""The two drivers of flows."""

from __future__ import annotations

import pytest

from txrpc._client.flow import Flow, arun, run


def flow(calls: list[object]) -> Flow[str]:
    try:
        yield calls.append, ("fails",)
        yield int, ("x",)
    except ValueError:
        calls.append("caught")
    calls.append((yield str, (5,)))
    return "done"


def test_run_makes_calls_and_passes_results_and_errors() -> None:
    calls: list[object] = []
    assert run(flow(calls)) == "done"
    assert calls == ["fails", "caught", "5"]


async def test_arun_awaits_what_can_be_awaited_and_takes_the_rest_as_it_is() -> None:
    calls: list[object] = []
    assert await arun(flow(calls)) == "done"

    async def double(number: int) -> int:
        return 2 * number

    def mixed() -> Flow[list[int]]:
        return [(yield double, (4,)), (yield abs, (-3,))]

    assert await arun(mixed()) == [8, 3]


def test_an_error_that_nobody_catches_leaves_the_flow() -> None:
    def broken() -> Flow[None]:
        yield int, ("x",)

    with pytest.raises(ValueError, match="invalid literal"):
        run(broken())
