"""Keys: what opens what, what never needs one, and what of them is kept."""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot_runtime.errors import KshotError
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings
from kshot_serve.storage.keys import SCOPES, Keys, Scope
from kshot_serve.storage.store import Store

Running = Any  # of conftest.py

KSHOT = Path(sys.executable).with_name("kshot")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'spaces.db'}")
    yield store
    store.close()


def check(keys: Keys, text: str | None) -> str:
    """The name of the key that a text is, or the code of its refusal."""
    try:
        return asyncio.run(keys.check(text)).name
    except Problem as problem:
        return problem.code


def test_a_key_is_found_by_its_text_and_by_nothing_else(store: Store) -> None:
    keys = Keys(store)
    key, text = keys.new("shop", "read")
    other, _ = keys.new("shelf", "read")
    assert check(keys, text) == "shop"
    assert check(keys, None) == check(keys, "") == "key_missing"
    for wrong in (
        text[:-1],
        text + "0",
        text.upper(),
        text.replace(key.id, other.id),
        "kshot__",
        "ключ",
        "\udc80",
        "x" * 10**6,
    ):
        assert check(keys, wrong) == "key_unknown"


def test_only_a_hash_of_a_key_is_kept(store: Store, tmp_path: Path) -> None:
    _, text = Keys(store).new("shop", "admin")
    secret = text.rsplit("_", 1)[1]
    assert len(bytes.fromhex(secret)) == 32
    assert secret != Keys(store).new("shop", "admin")[1].rsplit("_", 1)[1]
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"shop" in kept
    for form in (secret.encode(), bytes.fromhex(secret)):
        assert form not in kept


def test_each_scope_may_do_what_those_before_it_may(store: Store) -> None:
    keys = Keys(store)
    can = {scope: [keys.new(scope, scope)[0].may(needed) for needed in SCOPES] for scope in SCOPES}
    assert can == {"read": [True, False, False], "write": [True, True, False], "admin": [True, True, True]}


def test_a_revoked_key_opens_nothing_and_stays_in_the_list(store: Store) -> None:
    keys = Keys(store)
    key, text = keys.new("shop", "read")
    assert check(keys, text) == "shop"
    assert keys.revoke(key.id).revoked is not None
    assert check(keys, text) == "key_unknown"
    [listed] = keys.all()
    assert listed.revoked == keys.revoke(key.id).revoked  # the first time stays
    with pytest.raises(KshotError, match="kshot keys list"):
        keys.revoke("nothing")


def test_another_process_notices_a_revoked_key_within_seconds(store: Store) -> None:
    now = [0.0]
    server, command = Keys(store, clock=lambda: now[0]), Keys(store)
    key, text = command.new("shop", "read")
    assert check(server, text) == "shop"
    command.revoke(key.id)
    assert check(server, text) == "shop"
    now[0] = 5.0
    assert check(server, text) == "key_unknown"


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x1b[31m"])
def test_a_key_needs_a_name_that_can_be_shown(store: Store, name: str) -> None:
    with pytest.raises(KshotError, match="cannot name a key"):
        Keys(store).new(name, "read")


# On a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(
    features_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
    running: Callable[[Settings], AbstractContextManager[Running]],
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("locked")
    with running(Settings(source=str(features_bundle), folder=folder, port=0, leave_s=0, keys="required")) as server:
        yield server


@pytest.fixture(scope="module")
def bearer(locked: Running) -> dict[str, dict[str, str]]:
    keys = locked.backend.keys
    return {scope: {"Authorization": f"Bearer {keys.new(scope, scope)[1]}"} for scope in SCOPES}


OPEN = ("/healthz/live", "/healthz/ready", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json")


@pytest.mark.parametrize("path", OPEN)
def test_health_and_the_page_need_no_key(locked: Running, path: str) -> None:
    assert locked.http.get(path).status_code == 200


def test_what_is_open_holds_no_data(locked: Running, bearer: dict[str, Any], photo: Callable[..., bytes]) -> None:
    """The files of the page and of /docs are open too; all of it is the same whatever the label spaces hold."""
    page = [f"/page/{file.name}" for file in (files("kshot_serve") / "page").iterdir() if file.name.endswith(".js")]
    paths = (*OPEN, *page, "/page/style.css", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js")

    def answers() -> list[tuple[int, bytes]]:
        return [(found.status_code, found.content) for found in map(locked.http.get, paths)]

    before = answers()
    assert {status for status, _ in before} == {200}
    space = locked.http.post("/v1/spaces", json={"name": "secret plans"}, headers=bearer["write"]).json()["id"]
    added = {"data": {"name": "secret class"}, "files": [("photos", ("photo", photo("red")))]}
    assert locked.http.post(f"/v1/spaces/{space}/classes", **added, headers=bearer["write"]).status_code == 201
    assert answers() == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/spaces", "/v1/model", "/v1/limits", "/metrics", "/docs/", "/docs/x.js", "/v2", "/nothing",
        "/v1/spaces/health", "/v1/spaces/ready", "/v1/spaces/health/classes", "/v1/spaces/live",
        "/v2/models/health", "/v2/models/ready", "/v2/models/health/ready", "/v2/models/embed/ready",
        "/healthz/live/", "/healthz/live/x", "//healthz/live", "/healthz/../v1/spaces", "/v1/../healthz/live",
        "/v1/spaces?path=/healthz/live", "/v1/spaces;/healthz/live", "/v1/spaces%2f..%2f..%2fhealthz%2flive",
        "/HEALTHZ/LIVE", "/page/", "/page/nothing.js",
    ],
)  # fmt: skip
def test_everything_else_does_whatever_it_is_named(locked: Running, path: str) -> None:
    """CVE-2026-3514, CVE-2026-7722: no key was asked of any path that ended in `health` or `ready`."""
    connection = http.client.HTTPConnection(locked.url.removeprefix("http://"))  # it sends the path as it is
    connection.request("GET", path)
    refused = connection.getresponse()
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert b"needs an API key" in refused.read()
    connection.close()


def test_a_class_named_health_needs_a_key(locked: Running, bearer: dict[str, Any], photo: Callable[..., bytes]) -> None:
    made = locked.http.post("/v1/spaces", json={"name": "ready"}, headers=bearer["write"]).json()
    added = {"data": {"name": "health"}, "files": [("photos", ("photo", photo("red")))]}
    path = f"/v1/spaces/{made['id']}"
    assert locked.http.post(f"{path}/classes", **added).status_code == 401
    assert locked.http.post(f"{path}/classes", **added, headers=bearer["write"]).status_code == 201
    for each in (path, f"{path}/classes", f"/v2/models/{made['id']}/ready"):
        assert locked.http.get(each).status_code == 401
        assert locked.http.get(each, headers=bearer["read"]).status_code == 200


def test_every_write_is_a_revision_with_the_name_of_its_key(
    locked: Running, bearer: dict[str, Any], photo: Callable[..., bytes]
) -> None:
    def ask(method: str, path: str, **sent: Any) -> Any:
        answer = locked.http.request(method, path, headers=bearer["admin"], **sent)
        assert answer.is_success, answer.text
        return answer

    def photos(shade: int) -> dict[str, Any]:
        return {"files": [("photos", ("photo", photo("red", shade)))]}

    path = f"/v1/spaces/{ask('POST', '/v1/spaces', json={'name': 'written to'}).json()['id']}"
    class_ = ask("POST", f"{path}/classes", data={"name": "red"}, **photos(0)).json()["class"]["id"]
    added = ask("POST", f"{path}/classes/{class_}/photos", **photos(1)).json()["photos"]
    ask("PATCH", f"{path}/classes/{class_}", json={"name": "rot"})
    ask("PATCH", path, json={"accept": 0.9})
    ask("DELETE", f"{path}/photos/{added[0]}")
    ask("DELETE", f"{path}/classes/{class_}")
    ask("POST", f"{path}/rollback", json={"revision": 1})
    sent = {"content": ask("GET", f"{path}/export").content}
    copy = f"/v1/spaces/{ask('POST', '/v1/spaces/import', **sent).json()['id']}"
    told = [each for at in (copy, path) for each in ask("GET", f"{at}/revisions").json()["revisions"]]
    assert [(each["action"], each["number"]) for each in told] == [
        ("import", 1), ("rollback", 8), ("delete_class", 7), ("delete_photo", 6), ("change", 5), ("rename_class", 4),
        ("add_photos", 3), ("add_class", 2), ("create", 1),
    ]  # fmt: skip
    assert {each["who"] for each in told} == {"admin"}


def test_scopes_bound_what_a_key_may_do(locked: Running, bearer: dict[str, Any]) -> None:
    space = locked.http.post("/v1/spaces", json={"name": "scoped"}, headers=bearer["write"]).json()["id"]
    needed: tuple[tuple[str, str, Scope], ...] = (
        ("GET", f"/v1/spaces/{space}", "read"),
        ("PATCH", f"/v1/spaces/{space}", "write"),
        ("GET", f"/v1/spaces/{space}/export", "admin"),
        ("DELETE", f"/v1/spaces/{space}", "admin"),
    )
    for method, path, needs in needed:
        for scope in SCOPES:
            sent: dict[str, Any] = {"json": {"accept": 0.9}} if method == "PATCH" else {}
            if method == "DELETE" and scope == "admin":
                continue
            status = locked.http.request(method, path, headers=bearer[scope], **sent).status_code
            enough = SCOPES.index(scope) >= SCOPES.index(needs)
            assert status == (200 if enough else 403), (method, path, scope)
    assert locked.http.delete(f"/v1/spaces/{space}", headers=bearer["admin"]).status_code == 200


def test_a_key_may_come_in_either_header_and_never_in_the_address(locked: Running, bearer: dict[str, Any]) -> None:
    """Keys in addresses end up in logs, as those of others' services do."""
    text = bearer["read"]["Authorization"].removeprefix("Bearer ")
    assert locked.http.get("/v1/spaces", headers={"X-API-Key": text}).status_code == 200
    assert locked.http.get("/v1/spaces", headers={"Authorization": f"bearer {text}"}).status_code == 200
    for refused in ({"Authorization": f"Basic {text}"}, {"Authorization": text}, {"Cookie": f"key={text}"}):
        assert locked.http.get("/v1/spaces", headers=refused).status_code == 401
    assert locked.http.get("/v1/spaces", params={"api_key": text}).status_code == 401


def test_without_a_key_no_body_is_read(locked: Running) -> None:
    refused = locked.http.post("/v1/embed", content=b"x" * 100_000_000, headers={"Content-Type": "image/png"})
    assert refused.status_code == 401


def test_keys_are_needed_by_default_beyond_this_machine_only() -> None:
    def needs(host: str, **more: Any) -> bool:
        return Settings(source="", host=host, **more).needs_keys

    assert not any(needs(host) for host in ("127.0.0.1", "localhost", "::1"))
    assert all(needs(host) for host in ("0.0.0.0", "::", "192.168.1.7", "127.0.0.1.example"))
    assert needs("127.0.0.1", keys="required")
    assert not needs("0.0.0.0", keys="off")
    assert not needs("0.0.0.0", exposed=True)
    assert needs("0.0.0.0", exposed=True, keys="required")


def test_exposed_serves_beyond_this_machine_without_keys(features_bundle: Path, tmp_path: Path) -> None:
    command = [KSHOT, "serve", features_bundle, "--host", "0.0.0.0", "--exposed", "--port", "0", "--folder", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().rsplit(":", 1)[1].strip()
        assert httpx.get(f"http://127.0.0.1:{port}/v1/spaces").status_code == 200
    finally:
        process.terminate()
        process.communicate(timeout=30)
