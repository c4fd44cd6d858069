"""What bodies and answers may hold: a pool that all callers share, and no more of it for one than its part."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.api.bodies import Answer, Body
from kshot_serve.budgets import Budgets, Rate, Share, address_of
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Until = Callable[..., None]  # of conftest.py
Running = Any  # of conftest.py
Start = Callable[[Settings], AbstractContextManager[Running]]

PNG = {"Content-Type": "image/png"}


@contextmanager
def connected(server: Running, text: str, *bodies: bytes) -> Iterator[socket.socket]:
    """A connection that has sent the head of a request, and what is given of its body."""
    host = server.url.removeprefix("http://")
    with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=20) as there:
        there.sendall(text.replace("\n", f"\nHost: {host}\n", 1).replace("\n", "\r\n").encode())
        for each in bodies:
            there.sendall(each)
        yield there


def post(length: int, key: str = "", *more: str) -> str:
    """The head of a photo's request, for `connected`."""
    lines = [f"Content-Length: {length}", "Content-Type: image/png", *more, *([f"X-API-Key: {key}"] if key else [])]
    return "POST /v1/embed HTTP/1.1\n" + "".join(f"{line}\n" for line in lines) + "\n"


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    found = response.json()["error"]
    return response.status_code, found["code"], found.get("reason", "")


# The arithmetic ----------------------------------------------------------------------------------------------------


def test_one_caller_gets_its_share_and_the_next_ones_find_some() -> None:
    share = Share(100, 0.5, "bodies", "too many")
    share.take("a", 50)
    with pytest.raises(Problem, match="too many") as refused:
        share.take("a", 1)
    assert (refused.value.status, refused.value.reason) == (429, "bodies")
    share.take("b", 25)
    assert not share.fits("b", 1)
    assert share.fits("c", 12)
    share.give("b", 25)
    share.give("a", 50)
    assert (share.taken, dict(share.held)) == (0, {})


@pytest.mark.parametrize("callers", [1, 2, 3])
def test_callers_that_take_what_they_get_have_one_part_each_and_one_is_left(callers: int) -> None:
    share = Share(120, Settings(source="").share, "bodies", "too many")
    for _ in range(120):
        for caller in map(str, range(callers)):
            if share.fits(caller, 1):
                share.take(caller, 1)
    assert set(share.held.values()) == {120 // (callers + 1)}


def test_only_answers_above_64_kb_are_counted_until_they_are_sent() -> None:
    async def send(_: Any) -> None:
        pass

    async def whole() -> None:
        answers = Share(1_000_000, 1.0, "answers", "too many")
        for size, counted in ((64_000, 0), (64_001, 64_001)):
            answer, headers = Answer(send, answers, "a"), [(b"content-length", str(size).encode())]
            await answer.send({"type": "http.response.start", "status": 200, "headers": headers})
            assert answers.taken == counted
            answer.close()
            assert answers.taken == 0

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("pieces", "in_time"),
    [
        ([(29.9, 1)], True),
        ([(30.1, 1)], False),
        ([(10, 1), (20.1, 1)], False),
        ([(10, 100_000), (20.9, 1)], True),  # at 30.9 s
        ([(10, 100_000), (21.1, 1)], False),
        ([(10, 300_000), (22.9, 1)], True),
        ([(10, 300_000), (23.1, 1)], False),
        ([(0, 50_000_000), (29.9, 1)], True),
        ([(0, 50_000_000), (30.1, 1)], False),  # what came at once earns no more than it began with
    ],
)
def test_a_body_has_thirty_seconds_and_one_more_for_each_100_kb(pieces: list[tuple[float, int]], in_time: bool) -> None:
    """Each piece comes so many seconds after the one before; the clock is the test's."""

    async def whole() -> None:
        loop, now, coming = asyncio.get_running_loop(), 0.0, iter(pieces)
        loop.time = lambda: now  # type: ignore[method-assign]

        async def receive() -> Any:
            nonlocal now
            after, size = next(coming)
            now += after
            for _ in range(5):  # the event loop looks at its clock
                await asyncio.sleep(0)
            return {"type": "http.request", "body": bytes(size), "more_body": True}

        settings = Settings(source="")
        bodies = Share(settings.bodies_mb * 1_000_000, settings.share, "bodies", "too many")
        body = Body(receive, bodies, "a", None, settings.body_mb * 1_000_000, settings.body_s)
        for _ in pieces[:-1]:
            await body.receive()
        with nullcontext() if in_time else pytest.raises(Problem, match="the body comes too slowly"):
            await body.receive()

    asyncio.run(whole())


def test_a_share_of_one_is_all_of_it_and_never_more_than_there_is() -> None:
    share = Share(100, 1.0, "bodies", "too many")
    share.take("a", 100)
    assert not share.fits("b", 1)
    half = Share(100, 0.5, "bodies", "too many")
    half.take("a", 90, all_of_it=True)
    assert not half.fits("a", 11, all_of_it=True)
    with pytest.raises(Problem), half.holding("a"):
        pass
    with half.holding("b", 5):
        assert half.held["b"] == 5
    assert half.held["b"] == 0


def test_a_rate_lets_ten_seconds_worth_pass_at_once_and_then_so_many_a_second() -> None:
    now = 100.0
    rate = Rate(2.0, "too fast", lambda: now)
    for _ in range(20):
        rate.take("a")
    with pytest.raises(Problem, match="too fast") as refused:
        rate.take("a")
    assert (refused.value.reason, refused.value.retry_after) == ("rate", 0.5)
    rate.take("b")
    now = 100.5
    rate.take("a")
    with pytest.raises(Problem):
        rate.take("a")
    rate.give("a")
    rate.take("a")
    for _ in range(1000):
        Rate(0.0, "none").take("a")


def test_rates_of_many_callers_do_not_grow_memory() -> None:
    rate = Rate(1.0, "too fast")
    for number in range(20_000):
        rate.take(str(number))
    assert len(rate._full_at) == 10_000


def test_an_ipv6_network_is_one_client() -> None:
    for address, expected in (
        ("2001:db8::1", "2001:db8::/64"), ("2001:db8:0:0:ffff::2", "2001:db8::/64"), ("10.0.0.7", "10.0.0.7"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ):  # fmt: skip
        assert address_of({"client": (address, 1)}) in (expected, "fe80::/64")
    assert address_of({"client": None}) == ""


# Over sockets ------------------------------------------------------------------------------------------------------


def test_announced_bodies_reserve_nothing(features_bundle: Path, tmp_path: Path, running: Start, photo: Photo) -> None:
    """S1: eight silent connections with a Content-Length of 64 MB made everybody else's request a 429 for 30 s."""
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, bodies_mb=64)
    with running(settings) as server:
        silent = [connected(server, post(64_000_000, "", "Expect: 100-continue")) for _ in range(8)]
        try:
            for each in silent:
                assert b"100" in each.__enter__().recv(1000)  # its body is awaited now
            for shade in range(20):
                assert server.http.post("/v1/embed", content=photo("red", shade), headers=PNG).status_code == 200
            assert server.backend.budgets.bodies.taken == 0
        finally:
            for each in silent:
                each.__exit__(None, None, None)


def test_bytes_that_have_come_count_until_the_request_ends(
    features_bundle: Path, tmp_path: Path, running: Start, until: Until
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, bodies_mb=1, share=1.0)
    with running(settings) as server:
        bodies = server.backend.budgets.bodies
        with connected(server, post(900_001), b"x" * 900_000):
            until(lambda: bodies.taken == 900_000)
            assert dict(bodies.held) == {"127.0.0.1": 900_000}
            refused = server.http.post("/v1/embed", content=b"x" * 200_000, headers=PNG)
            assert refusal(refused) == (429, "busy", "bodies")
            assert int(refused.headers["retry-after"]) >= 1
        until(lambda: bodies.taken == 0)  # once the server has noticed that the holder hung up
        assert server.http.post("/v1/embed", content=b"x" * 200_000, headers=PNG).status_code == 422  # no image


def test_one_key_cannot_hold_the_bodies_of_all(
    features_bundle: Path, tmp_path: Path, running: Start, photo: Photo, until: Until
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, bodies_mb=1, keys="required"
    )  # fmt: skip
    with running(settings) as server:
        (greedy, one), (_, other) = (server.backend.keys.new(name, "read") for name in ("greedy", "other"))
        bodies = server.backend.budgets.bodies
        with connected(server, post(10_000_000, one), b"x" * 450_000):
            until(lambda: bodies.held[greedy.id] >= 450_000)
            more = server.http.post("/v1/embed", content=b"x" * 100_000, headers=PNG | {"X-API-Key": one})
            assert refusal(more) == (429, "busy", "bodies")
            answered = server.http.post("/v1/embed", content=photo("red"), headers=PNG | {"X-API-Key": other})
            assert answered.status_code == 200
            not_yet = server.http.post("/v1/embed", content=b"x" * 250_000, headers=PNG | {"X-API-Key": other})
            assert not_yet.status_code == 422  # not an image, but taken in: there was room for it


def test_an_import_may_take_all_of_the_bodies_bytes(features_bundle: Path, tmp_path: Path, running: Start) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, bodies_mb=1)
    with running(settings) as server:
        large = b"x" * 900_000
        assert refusal(server.http.post("/v1/embed", content=large, headers=PNG)) == (429, "busy", "bodies")
        no_zip = server.http.post("/v1/spaces/import", content=large, headers={"Content-Type": "application/zip"})
        assert refusal(no_zip) == (400, "bad_request", "")


def test_budgets_of_the_default_settings_take_what_the_limits_of_one_request_allow() -> None:
    settings = Settings(source="x")
    budgets = Budgets(settings)
    assert budgets.bodies.fits("a", settings.body_mb * 1_000_000)
    assert budgets.answers.fits("a", 6 * settings.image.max_bytes)  # a browser's connections, a photo on each
    assert budgets.bodies.fits("a", settings.space_mb * 1_000_000, all_of_it=True)
