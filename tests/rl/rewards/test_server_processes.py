"""Check that processes that do not start are started again, and that bodies are parsed one at a
time."""

import asyncio
import json
import types

import pytest

from blip3o_jax.config import UserError
from blip3o_jax.rl.rewards.processes import Future, ProcessEnded
from blip3o_jax.rl.rewards.server_processes import Renewed, RequestParser
from blip3o_jax.serving.refused import Refused
from tests.rl.rewards.in_process import body, png


def settled(result=None, error=None) -> Future:
    future = Future()
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
    return future


def test_processes_that_do_not_start_are_started_again():
    broken, closed = UserError("no process starts"), []

    def start():
        error = broken if len(closed) < 2 else None
        return types.SimpleNamespace(
            error=error,
            call=lambda *unused: settled("scores", error),
            close=lambda: closed.append(error),
        )

    async def run():
        processes = Renewed(start, pause=0.01)
        for _ in range(2):
            for _ in range(3):  # which schedule one start
                with pytest.raises(UserError, match="no process starts"):
                    await processes.call(len, tuple, 1.0)
            await asyncio.sleep(0.1)
        return await processes.call(len, tuple, 1.0), processes.ends

    assert asyncio.run(run()) == ("scores", {"timeout": 0, "ended": 0, "not started": 2})
    assert closed == [broken, broken]


def test_a_caller_that_leaves_does_not_cancel_what_a_process_has():
    async def run():
        future = Future()
        start = lambda: types.SimpleNamespace(call=lambda *unused: future, error=None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Renewed(start).call(len, tuple, 1.0), 0.01)
        future.set_result("late")  # which would raise in the thread of the processes

    asyncio.run(run())


class Process:
    """Replace the parser's process: hold every call until `release`."""

    def __init__(self, error=None):
        self.error, self.calls, self.release = error, 0, asyncio.Event()

    async def call(self, function, arguments, timeout):
        self.calls += 1
        given = arguments()
        await self.release.wait()
        if self.error is not None:
            raise self.error
        return function(*given)


def parser_of(process) -> RequestParser:
    parser = RequestParser(1000, small=0)
    parser._process = process
    return parser


def data() -> bytearray:
    return bytearray(json.dumps(body(png())).encode())


def test_large_bodies_are_parsed_one_at_a_time_and_given_up_where_the_client_left():
    async def run():
        process = Process()
        parser = parser_of(process)
        bodies = [data() for _ in range(3)]
        tasks = [asyncio.create_task(parser.parse(some)) for some in bodies]
        await asyncio.sleep(0.01)
        assert process.calls == 1
        tasks[1].cancel()
        process.release.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert process.calls == 2 and isinstance(found[1], asyncio.CancelledError)
        assert [found[index].images[0].pixels for index in (0, 2)] == [64, 64]
        assert not bodies[0] and not bodies[2]  # which frees what was sent

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TimeoutError(), 413),
        (ProcessEnded(-9), 500),
        (UserError("no process starts"), 503),
        (Refused(422, "wrong"), 422),
    ],
)
def test_why_a_body_is_not_parsed(error, status):
    async def run():
        process = Process(error)
        process.release.set()
        with pytest.raises(Refused) as refused:
            await parser_of(process).parse(data())
        return refused.value.status

    assert asyncio.run(run()) == status
