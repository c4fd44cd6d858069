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
