"""Admission: two numbers that an operator sets, shared out between callers; and room that calls wait for in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest

from kshot_serve.budgets import current_caller
from kshot_serve.errors import Problem
from kshot_serve.inference.admission import Admission, timely
from kshot_serve.inference.turns import Turns
from kshot_serve.settings import EngineSettings


def run(body: Callable[[Admission], Coroutine[Any, Any, None]], *, share: float = 0.5, **settings: Any) -> None:
    async def whole() -> None:
        await body(Admission(EngineSettings(**settings), share))

    asyncio.run(whole())


def done(admission: Admission, images: int, seconds: float) -> None:
    """As if so many images had just been worked on for so long."""
    admission._images, admission._seconds = float(images), seconds


@pytest.mark.parametrize(("share", "most"), [(0.25, 5), (0.5, 10), (1.0, 20)])
def test_one_caller_has_the_share_of_the_queue_that_is_set(share: float, most: int) -> None:
    async def body(admission: Admission) -> None:
        with ExitStack() as held:
            for _ in range(most):
                held.enter_context(admission.admit())
            with pytest.raises(Problem, match="the queue of 20"):
                admission.check()

    run(body, share=share, queue=20)


def test_ten_times_the_load_is_refused_at_once_and_the_queue_does_not_grow() -> None:
    """gh:triton-inference-server/server#6796: queue limits did not hold. gh:bentoml/BentoML#2603: "busy" and no why."""
    most, inside, refused, answered = 0, 0, [], 0

    async def caller(admission: Admission, number: int) -> None:
        nonlocal most, inside, answered
        current_caller.set(f"key {number % 4}")
        asked = time.monotonic()
        try:
            with admission.admit():
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1
                answered += 1
        except Problem as problem:
            refused.append((problem, time.monotonic() - asked))

    async def body(admission: Admission) -> None:
        for _ in range(10):
            await asyncio.gather(*[caller(admission, number) for number in range(160)])

    run(body, queue=20)
    assert 16 <= most <= 20  # four callers get a fifth each
    assert answered >= 160
    assert len(refused) == 1600 - answered
    for problem, _ in refused:
        assert (problem.code, problem.status, problem.reason) == ("busy", 429, "queue")
        assert problem.retry_after
        assert f"{most} images are being worked on" in problem.message
    assert sorted(seconds for _, seconds in refused)[len(refused) // 2] < 0.05


def test_places_are_counted_in_images_not_requests() -> None:
    """gh:bentoml/BentoML#3859: a limit on requests let their rows take all memory."""

    async def body(admission: Admission) -> None:
        with admission.admit(3):
            admission.check(1)
            with pytest.raises(
                Problem, match="3 images are being worked on, and 2 more would exceed one caller's share"
            ):
                admission.check(2)
            current_caller.set("another")
            with pytest.raises(Problem, match="3 images are being worked on, and 6 more would exceed the queue of 8"):
                admission.check(6)
        with admission.admit(20), pytest.raises(Problem):  # alone: it could never be served otherwise
            admission.check(1)
        admission.check(8)

    run(body, queue=8)


def test_one_caller_leaves_room_in_the_queue_for_the_next() -> None:
    async def body(admission: Admission) -> None:
        with ExitStack() as held:
            for caller, places in (("greedy", 16), ("next", 8), ("third", 4)):
                current_caller.set(caller)
                for _ in range(places):
                    held.enter_context(admission.admit())
                with pytest.raises(Problem) as told:
                    admission.check()
                assert told.value.reason == "queue"

    run(body, queue=32, wait_s=1000.0)


def test_a_wait_that_would_be_too_long_is_refused_with_its_length() -> None:
    async def body(admission: Admission) -> None:
        done(admission, 100, 10.0)  # ten images a second
        with admission.admit(12):
            admission.check()
            with admission.admit(9):
                with pytest.raises(Problem, match=r"exceed what can be begun in 2 s; try again in 3 s") as told:
                    admission.check()
                assert (told.value.status, told.value.reason, told.value.retry_after) == (
                    429,
                    "wait",
                    pytest.approx(2.1),
                )
                assert admission._wait_s == 2.0
        admission.check(100)

    run(body, wait_s=2.0)


def test_a_caller_waits_for_its_own_images_and_as_many_of_each_other() -> None:
    """A key with a long queue is refused, and the others are not: batches serve callers in turn."""

    async def body(admission: Admission) -> None:
        done(admission, 100, 10.0)  # ten images a second
        current_caller.set("greedy")
        with admission.admit(21):
            with pytest.raises(Problem, match="begun in 2 s"):
                admission.check()
            current_caller.set("other")
            for _ in range(5):
                with admission.admit(9):
                    admission.check()
            done(admission, 100, 10.0)
            with ExitStack() as held:  # a crowd of callers, each with one
                for number in range(20):
                    current_caller.set(f"{number}")
                    held.enter_context(admission.admit())
                current_caller.set("one too many")
                with pytest.raises(Problem, match="begun in 2 s"):
                    admission.check()

    run(body, wait_s=2.0)


def test_only_time_in_which_images_are_worked_on_makes_the_estimate() -> None:
    """Adapting, a slow database and slow clients hold places, and tell nothing about how fast images are done."""

    async def body(admission: Admission) -> None:
        done(admission, 100, 1.0)
        with admission.admit(10):
            await asyncio.sleep(0.2)
            with admission.working():
                await asyncio.sleep(0.05)
        with admission.working():
            await asyncio.sleep(0.2)  # for nobody who waits
        assert admission._images == pytest.approx(100 * 0.99**10 + 10)
        assert 0.94 < admission._seconds < 1.05

    run(body)


def test_what_is_not_done_by_the_deadline_is_given_up() -> None:
    async def body(_: Admission) -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(Problem) as told:
            async with timely(loop.time() + 0.02):
                await asyncio.sleep(5)
        assert (told.value.code, told.value.status) == ("too_late", 503)
        async with timely(float("inf")):
            await asyncio.sleep(0)

    run(body)


# Turns ------------------------------------------------------------------------------------------------------------


def in_turns(room: int, calls: list[tuple[str, int]], cancelled: tuple[int, ...] = ()) -> tuple[list[int], int]:
    """In which order calls of (caller, amount) got their turn, and the most that was held at once."""
    order: list[int] = []
    held = most = 0

    async def call(turns: Turns, number: int, caller: str, amount: int) -> None:
        nonlocal held, most
        current_caller.set(caller)
        async with turns.turn(amount):
            order.append(number)
            held += min(amount, room)
            most = max(most, held)
            try:
                await asyncio.sleep(0.02)
            finally:
                held -= min(amount, room)

    async def whole() -> None:
        turns = Turns(room)
        tasks = [asyncio.create_task(call(turns, number, *each)) for number, each in enumerate(calls)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert not turns._waiting
        assert not turns._held.taken

    asyncio.run(whole())
    return order, most


def test_callers_have_their_turn_one_after_the_other() -> None:
    order, most = in_turns(2, [*[("greedy", 1)] * 8, ("other", 1), ("other", 1)])
    assert most == 2
    assert order[:2] == [0, 1]  # nobody else waited
    assert {8, 9} <= set(order[2:6])
    assert [number for number in order if number < 8] == list(range(8))


def test_what_is_larger_than_the_room_goes_alone_and_is_not_passed_over() -> None:
    order, most = in_turns(4, [("a", 3), ("b", 9), ("c", 4), ("a", 1)])
    assert most == 4
    assert sorted(order) == [0, 1, 2, 3]


def test_who_gives_up_waiting_leaves_the_room_to_the_next() -> None:
    order, most = in_turns(1, [("a", 1), ("a", 1), ("b", 1), ("b", 1)], cancelled=(1, 2))
    assert (order, most) == ([0, 3], 1)
    order, _ = in_turns(1, [("a", 1), ("b", 1), ("a", 1)], cancelled=(0,))
    assert order == [0, 1, 2]
