"""Which key may do what to which label space: every operation, asked with every kind of key."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kshot_serve.settings import Settings
from kshot_serve.storage.keys import OPEN, SCOPES, Keys

Running = Any  # of conftest.py

KSHOT = Path(sys.executable).with_name("kshot")
PARAMETERS = {"space_id", "class_id", "photo_id", "model", "number"}
"""Of paths. One that names a label space in another way would not be seen by the check of bound keys."""


@pytest.fixture(scope="module")
def server(
    features_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
    running: Callable[[Settings], AbstractContextManager[Running]],
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("access")
    with running(Settings(source=str(features_bundle), folder=folder, port=0, leave_s=0, keys="required")) as started:
        yield started


@dataclass
class Asker:
    """Makes requests with one key."""

    server: Running
    text: str

    def __call__(self, method: str, path: str, **sent: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.text}"} if self.text else {}
        return self.server.http.request(method, path, headers=headers, **sent)


@pytest.fixture
def asker(server: Running) -> Callable[..., Asker]:
    """asker(scope, *spaces): requests with a key of this scope, bound to these label spaces."""

    def made(scope: Any, *spaces: str, **more: Any) -> Asker:
        return Asker(server, server.backend.keys.new(scope, scope, spaces=spaces, **more)[1])

    return made


def new_space(admin: Asker, photo: Callable[..., bytes]) -> str:
    made: str = admin("POST", "/v1/spaces", json={"name": f"space {time.time_ns()}"}).json()["id"]
    files = [("photos", ("photo", photo("red")))]
    assert admin("POST", f"/v1/spaces/{made}/classes", data={"name": "red"}, files=files).status_code == 201
    return made


def operations(admin: Asker) -> list[tuple[str, str, str]]:
    """Method, path and scope of every operation; what deletes a label space comes last."""
    paths = admin("GET", "/openapi.json").json()["paths"]
    found = [
        (method.upper(), path, each["x-kshot-scope"])
        for path, methods in paths.items()
        for method, each in methods.items()
    ]
    assert {name for _, path, _ in found for name in re.findall(r"{(\w+)}", path)} <= PARAMETERS
    return sorted(found, key=lambda each: each[:2] == ("DELETE", "/v1/spaces/{space_id}"))


def filled(path: str, space: str) -> str:
    """With this label space, and other ids that are of nothing."""
    nothing = {"class_id": "cls_" + "0" * 26, "photo_id": "pho_" + "0" * 26, "number": "1"}
    return path.format(space_id=space, model=space, **nothing)


def code(response: Any) -> str:
    """Of a refusal; of /v2, which has none, its status and message."""
    error = response.json()["error"] if response.status_code >= 400 else ""
    return error["code"] if isinstance(error, dict) else f"{response.status_code} {error}"


def test_every_operation_with_every_kind_of_key(server: Running, asker: Any, photo: Callable[..., bytes]) -> None:
    admin, nobody = asker("admin"), Asker(server, "")
    other = new_space(admin, photo)
    seen = 0
    for scope in SCOPES:
        for bound in (False, True):
            own = new_space(admin, photo)
            ask = asker(scope, *[own] * bound)
            for method, path, needed in operations(admin):
                refused = SCOPES.index(scope) < SCOPES.index(needed)
                if path in OPEN:
                    assert nobody(method, path).status_code == 200
                    continue
                assert nobody(method, filled(path, own)).status_code == 401
                found = ask(method, filled(path, own))
                about_one = "{space_id}" in path or "{model}" in path
                if refused or (bound and not about_one and needed != "read"):
                    assert found.status_code == 403, (method, path, scope, bound)
                else:
                    assert found.status_code not in (401, 403), (method, path, scope, bound)
                    assert code(found) not in ("space_unknown", "404 there is no such label space"), (method, path)
                if bound and about_one and not refused:  # another's is as one that never was
                    of_other, of_none = (ask(method, filled(path, each)) for each in (other, "spc_" + "0" * 26))
                    assert of_other.status_code == of_none.status_code == 404, (method, path)
                    assert code(of_other) == code(of_none)
                    assert code(of_other) in ("space_unknown", "404 there is no such label space"), (method, path)
                seen += 1
    assert seen > 100
    assert admin("GET", f"/v1/spaces/{other}").json()["revision"] == 2  # nobody has changed it


WRITE = {
    ("POST", "/v1/spaces"),
    ("PATCH", "/v1/spaces/{space_id}"),
    ("POST", "/v1/spaces/{space_id}/rollback"),
    ("POST", "/v1/spaces/{space_id}/classes"),
    ("PATCH", "/v1/spaces/{space_id}/classes/{class_id}"),
    ("DELETE", "/v1/spaces/{space_id}/classes/{class_id}"),
    ("POST", "/v1/spaces/{space_id}/classes/{class_id}/photos"),
    ("DELETE", "/v1/spaces/{space_id}/photos/{photo_id}"),
}
ADMIN = {
    ("GET", "/v1/spaces/{space_id}/export"),
    ("POST", "/v1/spaces/import"),
    ("DELETE", "/v1/spaces/{space_id}"),
}


def test_what_changes_a_label_space_needs_write_and_what_moves_or_ends_it_admin(asker: Any) -> None:
    """Everything else, which asks, lists and shows, needs read; the test above asks each operation with each scope."""
    found = operations(asker("read"))
    for scope, expected in (("write", WRITE), ("admin", ADMIN)):
        assert {(method, path) for method, path, needed in found if needed == scope} == expected
    assert {("GET", "/v1/spaces/{space_id}/photos/{photo_id}", "read"), ("GET", "/metrics", "read")} <= set(found)


def test_a_bound_key_lists_its_own_label_spaces_only(asker: Any, photo: Callable[..., bytes]) -> None:
    admin = asker("admin")
    first, second, third = (new_space(admin, photo) for _ in range(3))
    ask = asker("read", first, third)
    page = ask("GET", "/v1/spaces?limit=1").json()
    assert ([each["id"] for each in page["spaces"]], page["next"]) == ([first], first)
    page = ask("GET", f"/v1/spaces?after={first}").json()
    assert ([each["id"] for each in page["spaces"]], page["next"]) == ([third], None)
    assert second in [each["id"] for each in admin("GET", "/v1/spaces?limit=1000").json()["spaces"]]
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [0] * 768}]
    for each in (first, second):
        assert admin("POST", f"/v2/models/{each}/infer", json={"inputs": inputs}).status_code == 200
    index = [each["name"] for each in ask("POST", "/v2/repository/index").json()]
    assert index == ["embed", first, third]
    counted = [each["name"] for each in ask("GET", "/v2/models/stats").json()["model_stats"]]
    assert first in counted
    assert set(counted) <= {"embed", first}


def test_a_bound_key_may_ask_embed_and_verify(asker: Any, photo: Callable[..., bytes]) -> None:
    own = new_space(admin := asker("admin"), photo)
    ask = asker("read", own)
    one = {"content": photo("red"), "headers": {}}
    assert ask("POST", f"/v1/spaces/{own}/classify", files={"photos": photo("red")}).status_code == 200
    assert ask("POST", "/v1/embed", files={"photos": one["content"]}).status_code == 200
    assert ask("POST", "/v1/verify", files={"a": photo("red"), "b": photo("blue")}).status_code == 200
    assert ask("GET", "/v2/models/embed").status_code == 200
    assert ask("GET", f"/v2/models/{own}").status_code == 200
    assert admin("DELETE", f"/v1/spaces/{own}").status_code < 300
    assert ask("GET", "/v1/spaces").json()["spaces"] == []  # bound to nothing that is there, and still bound


def test_a_bound_key_learns_of_another_label_space_only_that_its_name_is_taken(
    asker: Any, photo: Callable[..., bytes]
) -> None:
    admin = asker("admin")
    own, other = new_space(admin, photo), new_space(admin, photo)
    name = admin("GET", f"/v1/spaces/{other}").json()["name"]
    refused = asker("write", own)("PATCH", f"/v1/spaces/{own}", json={"name": name})
    assert (refused.status_code, code(refused)) == (409, "conflict")
    assert other not in refused.text


def test_a_bound_key_may_be_made_by_the_name_of_a_label_space_and_expires(
    server: Running, asker: Any, photo: Callable[..., bytes], tmp_path: Path
) -> None:
    own = new_space(admin := asker("admin"), photo)
    name = admin("GET", f"/v1/spaces/{own}").json()["name"]
    folder = ["--folder", str(server.backend.settings.folder)]
    command = [KSHOT, "keys", "new", "shop", "--space", name, "--expires", "2h", "--owner", "ann", "--note", "till"]
    text = subprocess.run([*command, *folder], capture_output=True, text=True, check=True).stdout.strip()
    assert Asker(server, text)("GET", f"/v1/spaces/{own}").status_code == 200
    listed = subprocess.run([KSHOT, "keys", "list", *folder], capture_output=True, text=True, check=True).stdout
    assert "ann" in listed
    assert "till" in listed
    there = ["--database", server.backend.settings.database_url]
    assert subprocess.run([KSHOT, "keys", "list", *there], capture_output=True, text=True, check=True).stdout == listed
    wrong = subprocess.run([*command[:5], "nothing", *folder], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "no label space with the id or the name 'nothing'" in wrong.stderr
    assert (
        "such as 12h"
        in subprocess.run([*command[:4], "--expires", "soon", *folder], capture_output=True, text=True).stderr
    )


def test_a_key_that_has_expired_opens_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    key, text = server.backend.keys.new("brief", "read", expires="1h")
    ask = Asker(server, text)
    assert ask("GET", "/v1/model").status_code == 200
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3601)
    assert ask("GET", "/v1/model").status_code == 401
    assert Keys(server.backend.store)._find(text) is None
    assert key.expires is not None
