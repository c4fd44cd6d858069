"""Label spaces on disk: revisions, and what is deleted for good; on SQLite and on Postgres."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kshot_serve.errors import Problem
from kshot_serve.storage.revision import Write
from kshot_serve.storage.store import Store
from kshot_serve.storage.tables import is_id, new_id
from kshot_serve.storage.values import ORIGINAL, Class, Key, digest

FEATURES: Key = ("features", "bundle-1")
PIXELS: Key = ("pixels", "rule-1")
MANY = 1000


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store; every test runs on both databases."""
    url = f"sqlite:///{tmp_path / 'spaces.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    opened = Store(url)
    yield opened
    for space in opened.spaces(MANY):
        opened.delete(space.id)
    opened.close()


def create(store: Store, name: str = "pets") -> str:
    with store.creating(name, None, "ann", MANY) as new:
        pass
    return new.space


def photo(write: Write, class_: str, content: bytes) -> str:
    return write.add_photo(class_, digest(content), {ORIGINAL: content, PIXELS: content[:4], FEATURES: content[:8]})


def add(store: Store, space: str, name: str, *photos: bytes) -> tuple[str, list[str]]:
    with store.write(space, "add_class", "ann") as change:
        class_ = change.add_class(name)
        return class_, [photo(change, class_, content) for content in photos]


def held(store: Store, space: str) -> dict[str, list[str]]:
    return {each.name: [photo.id for photo in each.photos] for each in store.snapshot(space).classes}


def test_a_class_and_its_photos_are_there_as_they_were_written(store: Store) -> None:
    space = create(store)
    cat, [first, second] = add(store, space, "cat", b"first photo", b"second photo")
    found = store.snapshot(space)
    assert (found.name, found.revision, found.accept) == ("pets", 2, None)
    [class_] = found.classes
    assert isinstance(class_, Class)
    assert (class_.id, class_.name, [each.id for each in class_.photos]) == (cat, "cat", [first, second])
    assert class_.photos[0].sha256 == digest(b"first photo")
    assert class_.photos[0].created <= datetime.now(UTC)
    assert store.photo(space, second, [ORIGINAL]) == {ORIGINAL: b"second photo"}
    assert store.support(space, FEATURES)[1] == {first: b"first ph", second: b"second p"}
    described = store.space(space)
    assert (described.classes, described.photos, described.revision) == (1, 2, 2)


def test_ids_sort_by_the_time_they_were_made_and_are_never_the_same() -> None:
    ids = [new_id("pho") for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert all(is_id(each) for each in ids)
    assert not any(
        map(is_id, ("", "pho_", "pho_" + "u" * 26, "pho_" + "0" * 25, "pho_" + "0" * 27, "pho_\x00" + "0" * 25))
    )


def test_a_clock_that_was_set_back_does_not_change_the_order_of_lists(tmp_path: Path) -> None:
    """Found in review: classes and label spaces of a process that began later were listed before the old ones."""
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    add_one = (
        "import sys, time; now = time.time_ns; time.time_ns = lambda: now() - int(sys.argv[3]) * 10**9\n"
        "from kshot_serve.storage.store import Store; store = Store(sys.argv[1])\n"
        "with store.creating(sys.argv[2], None, '', 10) as new:\n"
        "    new.add_photo(new.add_class('class'), '', {('original', ''): b''})\n"
        "store.close()"
    )
    for name, seconds in (("first", -400 * 86400), ("second", 0), ("third", 400 * 86400)):
        subprocess.run([sys.executable, "-c", add_one, url, name, str(seconds)], check=True)
    store = Store(url)
    assert [each.name for each in store.spaces(MANY)] == ["first", "second", "third"]
    create(store, "fourth")
    assert [each.name for each in store.spaces(MANY)][-1] == "fourth"
    store.close()


def test_a_write_that_raises_is_not_there_at_all(store: Store) -> None:
    space = create(store)
    with pytest.raises(UnicodeEncodeError), store.write(space, "add_class", "ann") as change:
        photo(change, change.add_class("cat"), "half \ud800".encode())
    assert held(store, space) == {}
    assert store.space(space).revision == 1
    assert store.lacking([("features", "none")], MANY) == []


def test_a_write_that_changes_nothing_is_no_revision(store: Store) -> None:
    space = create(store)
    with store.write(space, "change", "ann") as change:
        pass
    assert (change.revision, store.space(space).revision) == (1, 1)
    assert len(store.revisions(space, 10)) == 1


def test_going_back_is_a_new_revision_that_equals_the_old_one(store: Store) -> None:
    space = create(store)
    cat, _ = add(store, space, "cat", b"a cat")
    with store.write(space, "rename_class", "ann") as change:
        change.rename_class(cat, "tabby")
    with store.write(space, "add_photos", "ann") as change:
        photo(change, cat, b"another cat")
    with store.write(space, "change", "ann") as change:
        change.accept(0.8)
    add(store, space, "dog", b"a dog")
    states = {}
    for number in (2, 3, 4, 5, 6, 1):
        with store.write(space, "rollback", "bob") as back:
            assert back.roll_back(number) == ()
        states[number] = (held(store, space), store.snapshot(space).accept)
    assert [sorted(states[number][0]) for number in (1, 2, 3, 6)] == [[], ["cat"], ["tabby"], ["dog", "tabby"]]
    assert [len(states[number][0]["tabby"]) for number in (3, 4)] == [1, 2]
    assert [states[number][1] for number in (4, 5, 6)] == [None, 0.8, 0.8]
    assert store.space(space).revision == 12
    with store.write(space, "change", "ann") as change:
        change.rename("animals")
    with store.write(space, "rollback", "bob") as back:
        back.roll_back(10)  # which was itself a way back, to 5
    assert (held(store, space), store.snapshot(space).accept) == states[5]
    assert store.space(space).name == "animals"


def test_revisions_tell_who_did_what_and_when(store: Store) -> None:
    moments = iter(range(100, 200))
    store.now = lambda: float(next(moments))
    space = create(store)
    cat, [first, _] = add(store, space, "cat", b"one", b"two")
    with store.write(space, "rename_class", "bob") as change:
        change.rename_class(cat, "tabby")
    with store.write(space, "delete_photo", "bob") as change:
        change.delete_photo(first)
    with store.write(space, "rollback", "bob") as change:
        change.roll_back(2)
    told = [(each.number, each.who, each.action, each.what, each.to) for each in store.revisions(space, 10)]
    assert told == [
        (5, "bob", "rollback", "to revision 2", 2),
        (4, "bob", "delete_photo", "a photo of tabby", None),
        (3, "bob", "rename_class", "to tabby", None),
        (2, "ann", "add_class", "cat, 2 photos", None),
        (1, "ann", "create", "", None),
    ]
    assert [each.created.timestamp() for each in store.revisions(space, 2, before=4)] == [102, 101]


@pytest.mark.parametrize("number", [0, -1, 3, 10**30])
def test_a_revision_that_never_was_is_refused(store: Store, number: int) -> None:
    space = create(store)
    add(store, space, "cat", b"a cat")
    with pytest.raises(Problem, match="has revisions 1 to 2") as caught, store.write(space, "rollback", "") as back:
        back.roll_back(number)
    assert caught.value.code == "revision_unknown"


def test_what_was_deleted_does_not_come_back_and_is_listed(store: Store) -> None:
    space = create(store)
    _, [gone, stays] = add(store, space, "cat", b"gone", b"stays")
    dog, [of_dog] = add(store, space, "dog", b"a dog")
    with store.write(space, "delete_photo", "") as change:
        change.delete_photo(gone)
    with store.write(space, "delete_class", "") as change:
        change.delete_class(dog)
    with store.write(space, "rollback", "") as back:
        assert set(back.roll_back(3)) == {gone, dog, of_dog}
    assert held(store, space) == {"cat": [stays]}
    assert "dog" not in str([store.revisions(space, 10), store.snapshot(space)])
    for lost in (gone, of_dog):
        with pytest.raises(Problem, match="no such photo"):
            store.photo(space, lost, [ORIGINAL])
    with pytest.raises(Problem, match="no such class"), store.write(space, "delete_class", "") as change:
        change.delete_class(dog)


def test_what_only_an_old_revision_holds_can_be_deleted_too(store: Store) -> None:
    space = create(store)
    cat, [first] = add(store, space, "cat", b"a cat")
    with store.write(space, "rollback", "") as back:
        back.roll_back(1)
    assert held(store, space) == {}
    assert store.photo(space, first, [ORIGINAL])
    with store.write(space, "delete_class", "") as change:
        change.delete_class(cat)
    with pytest.raises(Problem, match="no such photo"):
        store.photo(space, first, [ORIGINAL])


def test_no_label_space_sees_another_s_photos_and_classes(store: Store) -> None:
    mine, yours = create(store, "mine"), create(store, "yours")
    class_, [secret] = add(store, yours, "secret", b"secret")
    with pytest.raises(Problem, match="no such photo"):
        store.photo(mine, secret, [ORIGINAL])
    with pytest.raises(Problem, match="no such photo"):
        store.photo_facts(mine, secret)
    with pytest.raises(Problem, match="no such photo"), store.write(mine, "delete_photo", "") as change:
        change.delete_photo(secret)
    with pytest.raises(Problem, match="no such class"), store.write(mine, "delete_class", "") as change:
        change.delete_class(class_)
    assert held(store, yours) == {"secret": [secret]}
    assert held(store, mine) == {}
    assert store.support(mine, FEATURES)[1] == {}


@pytest.mark.parametrize(
    "space", ["", "spc_" + "0" * 26, "x" * 10_000, "spc_\x00", "\ud800", "'; DROP TABLE spaces; --"]
)
def test_an_id_that_is_none_is_an_unknown_label_space(store: Store, space: str) -> None:
    for ask in (store.snapshot, lambda space: store.photo_facts(space, new_id("pho"))):
        with pytest.raises(Problem) as caught:
            ask(space)
        assert caught.value.code == "space_unknown"


def test_what_is_known_of_a_photo_without_reading_it(store: Store) -> None:
    space = create(store)
    with store.write(space, "add_class", "ann") as change:
        class_ = change.add_class("cat")
        whole = photo(change, class_, b"first photo")
        reduced = change.add_photo(class_, digest(b"second photo"), {PIXELS: b"seco"})
    assert store.photo_facts(space, whole) == (digest(b"first photo"), 11 + 4 + 8, True)
    assert store.photo_facts(space, reduced) == (digest(b"second photo"), 4, False)
    for none in (new_id("pho"), "", "pho_\x00", "\ud800"):
        with pytest.raises(Problem) as caught:
            store.photo_facts(space, none)
        assert caught.value.code == "photo_unknown"


def test_names_of_label_spaces_are_their_own(store: Store) -> None:
    create(store, "pets")
    with pytest.raises(Problem, match="named 'pets' already") as caught:
        create(store, "pets")
    assert caught.value.code == "conflict"
    other = create(store, "plants")
    with pytest.raises(Problem, match="another label space has that name"), store.write(other, "change", "") as change:
        change.rename("pets")
    assert store.space(other).revision == 1


def test_label_spaces_are_listed_in_pages_from_the_oldest(store: Store) -> None:
    ids = [create(store, f"space {i}") for i in range(5)]
    first = store.spaces(2)
    assert [each.id for each in first] == ids[:2]
    assert [each.id for each in store.spaces(10, after=first[-1].id)] == ids[2:]
    assert store.count() == 5


def test_a_full_server_takes_no_more_label_spaces(store: Store) -> None:
    create(store)
    with pytest.raises(Problem, match="the most this server keeps"), store.creating("more", None, "", 1):
        pass


def test_many_writers_at_once_each_make_one_revision(store: Store) -> None:
    space = create(store)
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            for i in range(5):
                add(store, space, f"{name}{i}", name.encode())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.space(space).revision == 21
    assert sorted(held(store, space)) == sorted(f"{name}{i}" for name in "abcd" for i in range(5))
    assert [each.number for each in store.revisions(space, 100)] == list(range(21, 0, -1))


def test_contents_made_later_are_kept_once_and_only_of_photos_that_are_there(store: Store) -> None:
    space = create(store)
    _, [first, second] = add(store, space, "cat", b"one", b"two")
    newer: Key = ("features", "bundle-2")
    assert store.lacking([newer], 10) == [first, second]
    assert store.lacking([newer, ORIGINAL], 10) == []
    assert store.lacking([newer], 10, after=first) == [second]
    with store.write(space, "delete_photo", "") as change:
        change.delete_photo(first)
    for _ in range(2):
        store.keep(newer, {first: b"late", second: b"new"})
    assert store.contents([first, second], newer) == {second: b"new"}
    store.settle(PIXELS, newer)
    assert store.contents([second], FEATURES) == {}
    assert store.contents([second], newer) == {second: b"new"}
    store.settle(("pixels", "rule-2"), None)
    assert store.contents([second], newer) == {}
    assert store.contents([second], PIXELS) == {second: b"two"}  # nothing has replaced them


def test_the_largest_label_space_is_told_by_its_classes_and_photos(store: Store) -> None:
    assert store.largest() == (0, 0, 0)
    one, two = create(store, "one"), create(store, "two")
    add(store, one, "a", b"1", b"2", b"3")
    for name in "bcd":
        add(store, two, name, name.encode())
    assert store.largest() == (3, 3, 3)
    with store.write(two, "rollback", "") as back:
        back.roll_back(2)
    assert store.largest() == (1, 3, 3)


def test_a_database_opened_again_has_everything(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    first = Store(url)
    space = create(first)
    add(first, space, "cat", b"a cat")
    first.close()
    again = Store(url)
    assert list(held(again, space)) == ["cat"]
    again.close()


def test_two_processes_write_one_file_without_losing_anything(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    store = Store(url)
    space = create(store)
    writer = (
        "import sys; from kshot_serve.storage.store import Store; store = Store(sys.argv[1])\n"
        "for i in range(20):\n"
        "    with store.write(sys.argv[2], 'add_class', '') as change: change.add_class(f'{sys.argv[3]}{i}')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", writer, url, space, name]) for name in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert store.space(space).revision == 41
    assert len(held(store, space)) == 40
    store.close()


def test_what_another_server_has_written_is_seen_at_a_glance(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'spaces.db'}"
    store, other = Store(url), Store(url)
    space = create(store)
    assert store.glance(space) == 1
    with other.write(space, "add_class", "") as change:
        change.add_class("cat")
    assert store.glance(space) == 2
    other.delete(space)
    assert store.glance(space) is None
    store.close()
    other.close()
