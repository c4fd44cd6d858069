"""`kshot serve --photo-keys` as a process: to clients it is as any server, on the disk no photo can be read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from PIL import Image

KSHOT = Path(sys.executable).with_name("kshot")
MARKER = b"a comment in a JPEG that nobody else would write"


@contextmanager
def serving(bundle: Path, folder: Path, *options: str, database: str = "") -> Iterator[httpx.Client]:
    command = [KSHOT, "serve", bundle, "--port", "0", "--folder", folder, *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"KSHOT_DATABASE": database}
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("kshot serves"), (folder / "log").read_text()
        with httpx.Client(base_url=line.split()[-1], timeout=60) as http:
            yield http
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def marked(photo: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(file, "JPEG", comment=MARKER)
    return file.getvalue()


def add(http: httpx.Client, space: str, name: str, *photos: bytes) -> dict[str, list[str]]:
    files = [("photos", ("photo", photo)) for photo in photos]
    added = http.post(f"/v1/spaces/{space}/classes", data={"name": name}, files=files)
    assert added.status_code == 201, added.text
    return added.json()


def answer(http: httpx.Client, space: str, photo: bytes) -> str:
    [result] = http.post(f"/v1/spaces/{space}/classify", files={"photos": photo}).json()["results"]
    return result["classes"][0]["name"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_with_photo_keys_does_all_that_others_do(
    features_bundle: Path, tmp_path: Path, photo: Callable[..., bytes], workers: str
) -> None:
    options = ("--photo-keys", str(tmp_path / "keys.db"), "--workers", workers)
    red, blue = [marked(photo("red", shade)) for shade in range(2)], photo("blue")
    with serving(features_bundle, tmp_path, *options) as http:
        space = http.post("/v1/spaces", json={"name": "colours"}).json()["id"]
        first, second = add(http, space, "red", *red)["photos"]
        add(http, space, "blue", blue)
        assert [answer(http, space, photo(each, 9)) for each in ("red", "blue")] == ["red", "blue"]
        assert http.get(f"/v1/spaces/{space}/photos/{first}").content == red[0]
        assert http.get(f"/v1/spaces/{space}/photos/{first}/thumbnail").status_code == 200
        exported = http.get(f"/v1/spaces/{space}/export").content
        with ZipFile(io.BytesIO(exported)) as archive:
            assert red[0] in [archive.read(name) for name in archive.namelist()]
    assert not [path for path in tmp_path.glob("*.db*") if MARKER in path.read_bytes()]
    with serving(features_bundle, tmp_path, *options) as http:
        deleted = http.delete(f"/v1/spaces/{space}/photos/{first}")
        assert (deleted.status_code, deleted.json()["scrubbed"]) == (200, True)
        assert http.get(f"/v1/spaces/{space}/photos/{first}").status_code == 404
        back = http.post(f"/v1/spaces/{space}/rollback", json={"revision": 2}).json()
        assert back["gone"] == [first]
        assert http.get(f"/v1/spaces/{space}/photos/{second}").content == red[1]
        sent = http.post("/v1/spaces/import", content=exported, headers={"content-type": "application/zip"})
        assert answer(http, sent.json()["id"], photo("blue", 9)) == "blue"
        assert http.delete(f"/v1/spaces/{space}").json() == {"scrubbed": True}


def test_without_its_keys_a_server_does_not_start_and_says_why_in_one_sentence(
    features_bundle: Path, tmp_path: Path, photo: Callable[..., bytes]
) -> None:
    with serving(features_bundle, tmp_path, "--photo-keys", str(tmp_path / "keys.db")) as http:
        space = http.post("/v1/spaces", json={"name": "colours"}).json()["id"]
        add(http, space, "red", photo("red"))
    own = str(tmp_path / "spaces.db")
    for options, reason in (
        ([], "are encrypted, and there are no photo keys: start the server with the --photo-keys that"),
        (["--workers", "2"], "are encrypted, and there are no photo keys: start the server with the --photo-keys that"),
        (["--photo-keys", str(tmp_path / "others.db")], "others.db are not theirs: start the server with the"),
        (["--photo-keys", own], "photo keys must lie in another database than the label spaces"),
    ):
        command = [KSHOT, "serve", features_bundle, "--port", "0", "--folder", tmp_path, *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        told = " ".join(ended.stderr.split())
        assert reason in told
        assert "Traceback" not in told


def test_servers_on_postgres_with_a_key_file_say_that_a_photo_is_scrubbed(
    features_bundle: Path, tmp_path: Path, postgres: str, photo: Callable[..., bytes]
) -> None:
    options = ("--photo-keys", str(tmp_path / "keys.db"))
    (tmp_path / "other").mkdir()
    with (
        serving(features_bundle, tmp_path, *options, database=postgres) as http,
        serving(features_bundle, tmp_path / "other", *options, database=postgres) as other,
    ):
        space = http.post("/v1/spaces", json={"name": "shared and encrypted"}).json()["id"]
        [red] = add(http, space, "red", photo("red"))["photos"]
        add(other, space, "blue", photo("blue"))
        assert {answer(each, space, photo("red", 9)) for each in (http, other)} == {"red"}
        assert other.delete(f"/v1/spaces/{space}/photos/{red}").json()["scrubbed"] is True
        assert http.get(f"/v1/spaces/{space}/photos/{red}").status_code == 404
        assert http.delete(f"/v1/spaces/{space}").json() == {"scrubbed": True}
