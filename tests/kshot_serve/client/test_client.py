"""The client: a few lines, the server's own words, and patience with a busy one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kshot_client import AsyncClient, AsyncSpace, Client, ClientError, RefusedError, Space
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings

Photo = Callable[..., bytes]
Running = Any  # of conftest.py


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_five_lines_make_classes_and_ask(client: Client, photo: Photo, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(photo("red"))
    colours = client.space("five lines")
    assert colours.add("red", [tmp_path / "red.png", str(tmp_path / "red.png")]) == [
        "photo 2 is in this class already, and was left out"
    ]
    colours.add("blue", photo("blue"))
    answer = colours.classify(photo("blue", 3))
    assert (answer.name, answer.decision) == ("blue", "match")
    assert answer.whole["evidence"][0]["similarity"] > 0.5


def test_a_label_space_is_found_again_by_its_name(client: Client) -> None:
    made = client.space("found again")
    assert client.space("found again").id == made.id
    assert made.id in {space.id for space in client.spaces()}


def test_a_name_is_found_whichever_way_it_is_typed(client: Client, photo: Photo) -> None:
    """Seen in review: the server keeps names in their normal form, and the second call was a conflict."""
    space = client.space(" cafe\u0301 ")
    assert space.name == "caf\u00e9"
    assert client.space(" cafe\u0301 ").id == space.id
    for shade in range(2):
        space.add("the\u0301 ", photo("red", shade))
    [known] = space.classes()
    assert (known["name"], len(known["photos"])) == ("th\u00e9", 2)


def test_photos_are_added_to_the_class_that_is_there(client: Client, photo: Photo) -> None:
    space = client.space("grows")
    space.add("red", photo("red"))
    space.add("red", [photo("red", 1), photo("red", 2)])
    [known] = space.classes()
    assert len(known["photos"]) == 3
    assert space.rollback(space.revisions()[1]["number"]) == 4
    assert len(space.classes()[0]["photos"]) == 1


def test_what_is_refused_says_why_with_the_servers_code(client: Client, photo: Photo) -> None:
    space = client.space("refuses")
    with pytest.raises(RefusedError) as refused:
        space.classify(photo("red"))
    assert (refused.value.code, refused.value.status) == ("too_few_classes", 409)
    assert refused.value.request_id.startswith("req_")
    space.add("red", photo("red"))
    space.add("blue", photo("blue"))
    with pytest.raises(RefusedError, match="not an image"):
        space.classify(b"no photo")
    good, bad = space.classify_all([photo("red", 1), b"no photo"])
    assert not isinstance(good, RefusedError)
    assert isinstance(bad, RefusedError)
    assert bad.code == "not_an_image"


def test_a_label_space_travels(client: Client, photo: Photo) -> None:
    space = client.space("travels")
    space.add("red", photo("red"))
    copy = client.import_space(space.export())
    assert copy.name == "travels (2)"
    assert [each["name"] for each in copy.classes()] == ["red"]
    copy.delete()
    assert "travels (2)" not in {each.name for each in client.spaces()}


def test_vectors_and_pairs(client: Client, photo: Photo) -> None:
    [vector] = client.embed(photo("red"))
    assert len(vector) == len(client.embed([photo("red"), photo("blue")])[1])
    assert client.same(photo("red"), photo("red", 1)) > client.same(photo("red"), photo("blue"))


def test_a_busy_server_is_asked_again_after_the_time_it_names(
    server: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [
        Problem("busy", "full", retry_after=1),
        Problem("not_ready", "soon", retry_after=2),
        Problem("draining", "ends", retry_after=3),
    ]
    waited: list[float] = []
    real = server.backend.spaces.list

    async def list_(*given: Any, **named: Any) -> Any:
        if refusals:
            raise refusals.pop(0)
        return await real(*given, **named)

    monkeypatch.setattr(server.backend.spaces, "list", list_)
    monkeypatch.setattr("kshot_client.blocking.time.sleep", waited.append)
    assert isinstance(list(client.spaces()), list)
    assert waited == [1.0, 2.0, 3.0]
    refusals += [Problem("busy", "full", retry_after=1)] * 9
    with pytest.raises(RefusedError, match="full") as refused:
        client.spaces()
    assert (refused.value.code, waited[3:], len(refusals)) == ("busy", [1.0] * 4, 4)


def test_a_key_is_sent_along(server: Running) -> None:
    with Client(server.url, key="kshot_x") as client:
        assert client._awaited._http.headers["Authorization"] == "Bearer kshot_x"


def test_a_missing_httpx_is_told_with_what_to_do() -> None:
    code = "import sys; sys.modules['httpx'] = None\nfrom kshot_client import Client\nClient()"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ClientError: the client needs httpx: pip install 'kshot[client]'" in failed.stderr


def test_more_photos_than_one_request_takes_go_in_several(client: Client, photo: Photo) -> None:
    most = client.limits()["request"]["photos"]
    space = client.space("splits")
    notes = space.add("red", [*(photo("red", shade) for shade in range(most + 2)), photo("red", 1)])
    assert notes == [f"photo {most + 3} is in this class already, and was left out"]
    space.add("blue", photo("blue"))
    [blue, red] = sorted(space.classes(), key=lambda each: each["name"])
    assert (len(blue["photos"]), len(red["photos"])) == (1, most + 2)
    asked = [photo("blue", shade) for shade in range(most)]
    answers = space.classify_all([*asked, b"no photo"])
    assert [answer.name for answer in answers[:-1] if not isinstance(answer, RefusedError)] == ["blue"] * most
    assert isinstance(answers[-1], RefusedError)
    assert len(client.embed([*asked, photo("red")])) == most + 1


def test_requests_stay_below_the_bytes_that_a_server_takes(
    running: Any, features_bundle: Path, photo: Photo, tmp_path: Path
) -> None:
    large = photo("red", kind="PNG", size=(500, 300))  # about 400 kB
    settings = Settings(source=str(features_bundle), folder=tmp_path, port=0, leave_s=0, body_mb=1)
    with running(settings) as server, Client(server.url) as client:
        assert 4 * len(large) > 1_000_000
        assert len(client.embed([large] * 4)) == 4


def test_classes_and_spaces_are_renamed_and_deleted(client: Client, photo: Photo) -> None:
    space = client.space("changes")
    space.add("red", [photo("red"), photo("red", 1)])
    space.add("bleu", photo("blue"))
    space.rename_class("bleu", "blue")
    space.rename("changed")
    assert client.space("changed").id == space.id
    [first, _] = next(each["photos"] for each in space.classes() if each["name"] == "red")
    assert space.photo(first["id"]) == photo("red")
    space.delete_photo(first["id"])
    space.delete_class("blue")
    assert [(each["name"], len(each["photos"])) for each in space.classes()] == [("red", 1)]
    with pytest.raises(ClientError, match="changed has no class 'blue'; it has red"):
        space.delete_class("blue")


def test_the_share_that_is_accepted_is_set_and_given_back(client: Client) -> None:
    space = client.space("accepts")
    assert space.accept(0.9)["accept"] == 0.9
    assert space.accept(None)["accept"] is None


def test_the_asynchronous_client_has_the_same_methods(server: Running, photo: Photo) -> None:
    async def told() -> list[str | None]:
        async with AsyncClient(server.url) as client:
            space = await client.space("awaited")
            await asyncio.gather(space.add("red", photo("red")), space.add("blue", photo("blue")))
            asked = [space.classify(photo(colour, 3)) for colour in ("red", "blue", "red")]
            names = [answer.name for answer in await asyncio.gather(*asked)]
            assert [each.name for each in await client.spaces() if each.id == space.id] == ["awaited"]
            await space.delete()
            return names

    assert asyncio.run(told()) == ["red", "blue", "red"]
    for blocking, awaited in ((Client, AsyncClient), (Space, AsyncSpace)):
        assert {n for n in vars(blocking) if n[0] != "_"} - {"id", "name"} == {n for n in vars(awaited) if n[0] != "_"}
