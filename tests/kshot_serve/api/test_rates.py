"""How often one may ask: requests of a key, and wrong keys of an address, which would each ask the database."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_serve.api.app import create_app
from kshot_serve.api.middleware import refuse
from kshot_serve.budgets import Budgets
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings

Running = Any  # of conftest.py
Start = Callable[[Settings], AbstractContextManager[Running]]


def wrong() -> dict[str, str]:
    return {"X-API-Key": f"kshot_{'0' * 10}_{secrets.token_hex(32)}"}


def reason(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    return response.status_code, error.get("reason", error["code"])


def counting(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the database is asked about from now on."""
    asked: list[str] = []
    find = server.backend.keys._find

    def counted(text: str) -> Any:
        asked.append(text)
        return find(text)

    monkeypatch.setattr(server.backend.keys, "_find", counted)
    return asked


def test_wrong_keys_of_an_address_are_bounded_and_hold_up_no_right_one(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S13: 480 wrong keys in a second, and each a question for the database."""
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", wrong_keys_per_s=0.5
    )
    with running(settings) as server:
        right, new = ({"X-API-Key": server.backend.keys.new(name, "read")[1]} for name in ("right", "new"))
        assert server.http.get("/v1/spaces", headers=right).status_code == 200
        asked = counting(server, monkeypatch)
        found = [server.http.get("/v1/spaces", headers=wrong()) for _ in range(40)]
        statuses = Counter(map(reason, found))
        assert set(statuses) == {(401, "key_unknown"), (429, "rate")}
        assert 5 <= statuses[401, "key_unknown"] == len(asked) < 20
        assert int(found[-1].headers["retry-after"]) >= 1
        assert server.http.get("/v1/spaces", headers=new).status_code == 200  # though it was never asked about before
        guessed = [
            server.http.get("/v1/spaces", headers={"X-API-Key": new["X-API-Key"][:-64] + secrets.token_hex(32)})
            for _ in range(40)
        ]
        assert reason(guessed[0]) == (401, "key_unknown")  # counted for the key, and not for the address
        assert (429, "rate") in map(reason, guessed)
        server.backend.keys._clock = lambda: 1e9  # what is remembered of the right key has to be asked for again
        assert server.http.get("/v1/spaces", headers=right).status_code == 200
        assert reason(server.http.get("/v1/spaces")) == (401, "key_missing")


def test_a_wrong_key_is_asked_about_once_in_five_seconds(
    features_bundle: Path, tmp_path: Path, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required")
    with running(settings) as server:
        keys, now, revoked = server.backend.keys, 0.0, wrong()
        keys._clock = lambda: now
        asked = counting(server, monkeypatch)
        for _ in range(100):
            assert reason(server.http.get("/v1/spaces", headers=revoked)) == (401, "key_unknown")
        assert len(asked) == 1
        now = 6.0
        assert reason(server.http.get("/v1/spaces", headers=revoked)) == (401, "key_unknown")
        assert len(asked) == 2
        monkeypatch.setattr("kshot_serve.storage.keys._WRONG_KEYS", 10)
        for _ in range(20):
            server.http.get("/v1/spaces", headers=wrong())
        assert len(keys._wrong) <= 11


def test_who_goes_on_after_ten_refusals_in_a_second_is_refused_everything_for_half_of_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("kshot_serve.budgets.monotonic", lambda: now)
    budgets = Budgets(Settings(source=""))
    for caller, wait, expected in (("a", 1.0, 0.5), ("b", 1.6, 0.8), ("c", 5.0, 1.0)):
        for _ in range(10):
            budgets.refused(caller, wait)
        assert not budgets.refuses(lambda: caller)  # noqa: B023
        now += 0.9
        budgets.refused(caller, wait)
        now += expected - 0.01
        assert budgets.refuses(lambda: caller)  # noqa: B023
        assert not budgets.refuses(lambda: "another")
        now += 0.02
        assert not budgets.refuses(lambda: caller)  # noqa: B023
    for _ in range(40):
        budgets.refused("slow", 1.0)
        now += 0.11
        assert not budgets.refuses(lambda: "slow")


def test_only_refusals_of_too_much_count_for_that(features_bundle: Path, tmp_path: Path) -> None:
    backend = create_app(Settings(source=str(features_bundle), folder=tmp_path)).state.backend
    try:
        counted = set()
        reasons = ("bodies", "answers", "queue", "requests", "rate", "wait", "connections", "database", "deadline")
        for number, reason in enumerate(reasons):
            scope = {"type": "http", "path": "/v1/embed", "headers": [], "client": (address := f"10.0.0.{number}", 1)}
            for _ in range(11):
                refuse(Problem("busy", "too much", retry_after=2, reason=reason), scope, backend)
            if backend.budgets.refuses(lambda: address):
                counted.add(reason)
        assert counted == set(reasons[:6])
    finally:
        backend.store.close()


def test_requests_of_a_key_are_bounded_where_that_is_set_and_the_health_checks_are_not(
    features_bundle: Path, tmp_path: Path, running: Start
) -> None:
    settings = Settings(
        source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, keys="required", requests_per_s=0.5
    )
    with running(settings) as server:
        one, two = ({"X-API-Key": server.backend.keys.new(name, "read")[1]} for name in ("one", "two"))
        found = [server.http.get("/v2", headers=one) for _ in range(30)]
        statuses = Counter(each.status_code for each in found)
        assert set(statuses) == {200, 429}
        assert 5 <= statuses[200] < 20
        assert found[-1].json()["error"]  # in the shape of the protocol
        assert int(found[-1].headers["retry-after"]) >= 1
        assert server.http.get("/v2", headers=two).status_code == 200
        assert all(server.http.get("/healthz/live", headers=one).status_code == 200 for _ in range(30))


def test_a_forwarded_address_makes_nobody_another_client(features_bundle: Path, tmp_path: Path, running: Start) -> None:
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, requests_per_s=0.5)
    with running(settings) as server:
        found = [
            server.http.get("/v2", headers={"X-Forwarded-For": f"10.0.0.{number}", "Forwarded": f"for=10.0.0.{number}"})
            for number in range(30)
        ]
        assert {each.status_code for each in found} == {200, 429}
