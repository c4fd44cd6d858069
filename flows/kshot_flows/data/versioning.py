"""Versions of data sets: recorded in `data.dvc`, pushed, pulled, verified and rebuilt.

Data are verified before they are recorded, and only `remove` deletes entries of `data.dvc`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from kshot.data.datasets import IMAGES, INDEX, SHEET, ImageSet, data_sets
from kshot_flows import project
from kshot_flows.data.pointer import Entry, Pointer
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from kshot.data.importing import Progress
    from kshot_flows.data.cache import Cache

State = Literal["recorded", "changed", "not recorded", "missing", "damaged"]


def data_root() -> Path:
    """The folder of data sets: KSHOT_DATA, or else `data` in the project's folder."""
    if chosen := os.environ.get("KSHOT_DATA"):
        return Path(chosen).absolute()
    return project.home() / "data"


@dataclass(frozen=True)
class Present:
    """A data set in the data folder, and how it got there."""

    data_set: ImageSet
    how: Literal["was there", "pulled", "built"]
    same: bool | None  # whether it matches the committed data.dvc; None if that has no entry
    note: str = ""  # message for the user


@dataclass(frozen=True)
class Recorded:
    """What a recording changed in data.dvc."""

    new: tuple[str, ...] = ()  # data sets whose entry was added or changed
    other: tuple[str, ...] = ()  # those of them that had another version
    split: bool = False  # whether it was converted from an earlier format, one entry for the whole folder

    def lines(self, root: Path) -> list[str]:
        """Messages for the user."""
        file, other = f"{root.name}.dvc", _list(self.other)
        said = {
            f"{file} names each data set by itself now; before, it named the folder as a whole": self.split,
            f"recorded in {file}: {_list(self.new)}": self.new,
            f"{file} named another version of {other}; back to that: git checkout {file}; kshot data pull {other}":
                self.other,
        }  # fmt: skip
        return [line for line, so in said.items() if so]


def record(root: Path, *names: str) -> Recorded:
    """Record the present versions of some or all data sets in data.dvc.

    Each is verified first and copied to DVC's cache. Unchanged data sets need no DVC.
    """
    if why := why_not_versioned(root):
        raise KshotError(why)
    found = {name: verified(name, root) for name in names or data_sets(root)}
    if not found:
        raise KshotError(f"{root} holds no data set yet. Bring one in: kshot data import SOURCE NAME")

    def changed(pointer: Pointer) -> tuple[str, ...]:
        pointer.refuse_twice(but=found)
        known = {name: entry.version for name, entry in pointer.sets.items()}
        return tuple(name for name in found if known.get(name) != found[name].version)

    pointer = Pointer.read(root)
    if not changed(pointer) and (names or not pointer.former):
        return Recorded()
    with _dvc(root) as cache:
        pointer = Pointer.read(root)  # another process may have recorded a data set meanwhile
        new = changed(pointer)
        _write_settings(root)
        entries = {name: _updated(pointer, name, cache.add(name, found[name].version)) for name in new}
        for name in pointer.sets.keys() - entries.keys() if pointer.former else ():
            entries[name] = _apart(name, root, pointer, cache)
        pointer.changed(entries).write()
    return Recorded(new, tuple(name for name in new if name in pointer.sets), pointer.former)


def remove(root: Path, *names: str) -> None:
    """Remove entries from data.dvc; the files stay."""
    pointer = Pointer.read(root)
    if unknown := [name for name in names if name not in {*pointer.sets, *pointer.twice}]:
        raise KshotError(f"{pointer.file.name} does not name {', '.join(unknown)}; it names: {_list(pointer.sets)}")
    pointer.refuse_twice(but=names)
    with _dvc(root) as cache:
        pointer = Pointer.read(root)
        kept = pointer.sets.keys() - set(names) if pointer.former else ()
        pointer.changed({name: _apart(name, root, pointer, cache) for name in kept}, drop=names).write()


def recorded(root: Path, name: str) -> str | None:
    """DVC's hash of a data set, from data.dvc; None without an entry or outside a DVC repository."""
    known = Pointer.read(root).sets.get(name) if versioned(root) else None
    return known.md5 if known else None


def versioned(root: Path) -> bool:
    """Whether the data folder is in a DVC repository."""
    return _repository(root) is not None


def in_git(root: Path) -> bool:
    """Whether the data folder is in a git repository."""
    return any((folder / ".git").exists() for folder in root.parents)


def why_not_versioned(root: Path) -> str:
    """Why the data folder is not versioned, and how to change it; empty if it is."""
    if versioned(root):
        return ""
    start = "dvc init" if in_git(root) else "git init && dvc init, or dvc init --no-scm"
    return f"{root} is in no DVC repository, so it has no version there. To start one: {start}"


def ensure(
    name: str, root: Path, source: str | None = None, watch: Callable[[Progress], None] = lambda progress: None
) -> Present:
    """The data set of this name, verified: present, else pulled if possible, else built by its source.

    `source` is `name` unless said otherwise. What was pulled or built is compared with what the committed data.dvc
    names; a difference is reported, and no error: the data set is sound, only not the same.
    """
    root.mkdir(parents=True, exist_ok=True)
    # else a pull was interrupted, or nothing is here
    if all((root / name / file).exists() for file in (INDEX, IMAGES)):
        return _present(name, root, "was there")
    failed, note = why_not_versioned(root), ""
    try:
        if not failed and not recorded(root, name):
            failed = f"{root.name}.dvc does not name it"
        if not failed:
            pull(root, name)
            return _present(name, root, "pulled")
    except KshotError as error:
        failed = f"it could not be pulled ({error})"
        note = "" if "no DVC remote" in failed else f"{name} was built, as {failed}"
    with FileLock(root / ".locks" / f"~ensure-{name}"):
        if (root / name / INDEX).exists():  # built meanwhile by another process
            return _present(name, root, "was there")
        try:
            _build(source or name, name, root, watch)
        except KshotError as error:
            raise KshotError(f"data set {name!r} is not in {root}; {failed}; and building it: {error}") from None
    built = _present(name, root, "built")
    return replace(built, note=". ".join(filter(None, [note, built.note])))


_sound: set[tuple[object, ...]] = set()  # file states that this process has verified


def verified(name: str, root: Path) -> ImageSet:
    """A data set whose bytes match its index; otherwise an error that says what to do."""
    data_set, found = ImageSet.open(root / name), (root / name / IMAGES).stat()
    state = (data_set.folder, data_set.version, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    if state not in _sound:
        data_set.verify()
        _sound.add(state)
    return data_set


def push(root: Path, *names: str) -> int:
    """Copy recorded data sets to the DVC remote, and verify them there; returns the number of new files."""
    pointer = _named(root, names)
    with _dvc(root) as cache:
        if pointer.former:
            md5 = next(iter(pointer.sets.values())).md5
            if lost := cache.lacking(md5):
                raise KshotError(
                    f"DVC's cache lacks {', '.join(lost)} of the folder that {pointer.file.name} names, so nothing was "
                    "pushed. Record the data sets that are here anew: kshot data commit"
                )
            return cache.push(md5)
        for name in (chosen := {name: pointer.sets[name] for name in names or pointer.sets}):
            cache.url(chosen[name].more.get("remote"))
            _into_cache(name, root, chosen[name], cache)
        return sum(cache.push(entry.md5, entry.more.get("remote")) for entry in chosen.values())


def pull(root: Path, *names: str) -> list[str]:
    """Fetch recorded data sets from DVC's cache or the remote; returns those that were not already here.

    An unrecorded version is never overwritten: it is an error.
    """
    pointer = _named(root, names)
    states = state_of(root, names or pointer.sets)
    wrong = [name for name, state in states.items() if state != "recorded"]
    if not wrong:
        return []
    with _dvc(root) as cache:
        for name in wrong:
            entry, only = pointer.sets[name], name if pointer.former else None
            if cache.lacking(entry.md5, only, read=states[name] == "damaged"):
                try:
                    cache.fetch(entry.md5, only, entry.more.get("remote"))
                except KshotError as error:
                    raise KshotError(f"{name} is not in DVC's cache, and {error}") from None
        for name in wrong:
            try:
                cache.checkout(name, (IMAGES, INDEX) if _worthless(root / name, pointer.sets[name]) else ())
            except Exception as error:
                if "unsaved files" not in str(error):
                    raise
                raise KshotError(
                    f"a pull would remove data that no version records ({name}: {states[name]}). "
                    f"Move {root / name} away, or record it: kshot data commit {name}"
                ) from None
    for name in wrong:
        try:
            verified(name, root)
        except KshotError as error:
            raise KshotError(
                f"{pointer.file.name} names a damaged {name}: {error}. An earlier {pointer.file.name} may name a sound "
                f"one: git checkout {pointer.file.name} or git log {pointer.file.name}, then kshot data pull"
            ) from None
    return wrong


def remote(root: Path) -> tuple[str, bool]:
    """The DVC remote's URL, and whether it exists; an error if none is configured or it cannot be used."""
    with _dvc(root) as cache:
        return cache.url(), cache.reached()


def state_of(root: Path, names: Iterable[str] = (), read: bool = True) -> dict[str, State]:
    """How data sets agree with data.dvc: those named, or all that are here or recorded.

    Every byte is read, or else indexes only.
    """
    pointer, found = Pointer.read(root), dict[str, State]()
    for name in sorted(names or {*data_sets(root), *pointer.sets}):
        if not (root / name).exists():
            found[name] = "missing"
            continue
        try:
            version = (verified(name, root) if read else ImageSet.open(root / name)).version
        except KshotError:
            found[name] = "damaged"
            continue
        known = pointer.sets.get(name)
        found[name] = "not recorded" if known is None else "recorded" if known.version == version else "changed"
    return found


# ---- parts


def _dvc(root: Path) -> AbstractContextManager[Cache]:
    from kshot_flows.data import cache

    if (repository := _repository(root)) is None:
        raise KshotError(why_not_versioned(root))
    return cache.opened(root, repository)


def _repository(root: Path) -> Path | None:
    """The nearest parent folder that is a DVC repository."""
    return next((folder for folder in root.parents if (folder / ".dvc").is_dir()), None)


def _named(root: Path, names: Sequence[str]) -> Pointer:
    """The pointer; an error if it has no entries, or lacks one of these data sets."""
    if why := why_not_versioned(root):
        raise KshotError(why)
    pointer = Pointer.read(root)
    pointer.refuse_twice()
    if not pointer.sets:
        raise KshotError(
            f"{pointer.file} names no data set: nothing is recorded yet. Record what is in {root}: kshot data commit"
        )
    if unknown := [name for name in names if name not in pointer.sets]:
        raise KshotError(
            f"{pointer.file.name} does not name {', '.join(unknown)}; it names: {_list(pointer.sets)}. "
            f"Record what is in {root}: kshot data commit {' '.join(unknown)}"
        )
    return pointer


def _apart(name: str, root: Path, pointer: Pointer, cache: Cache) -> Entry:
    """The entry of a data set that was recorded only as part of the whole folder."""
    known = pointer.sets[name]
    if (root / name / INDEX).exists() and (found := verified(name, root)).version == known.version:
        return cache.add(name, found.version)
    try:
        return replace(cache.part(known.md5, name), version=known.version)
    except KshotError as error:
        raise KshotError(
            f"{pointer.file.name} names the folder as a whole, with {name} in it, which is not here as recorded, so "
            f"that the data sets cannot be named one by one ({error}). Bring it: kshot data pull {name}; or drop it on "
            f"purpose: kshot data remove {name}"
        ) from None


def _worthless(folder: Path, recorded: Entry) -> bool:
    """Whether the data set here is a damaged copy of the recorded one, or cannot be opened."""
    with suppress(KshotError):
        return ImageSet.open(folder).version == recorded.version
    return True


def _updated(pointer: Pointer, name: str, entry: Entry) -> Entry:
    """The new entry with the keys that users added to the old one."""
    former = pointer.sets.get(name)
    return replace(entry, more=former.more) if former else entry


def _into_cache(name: str, root: Path, entry: Entry, cache: Cache) -> None:
    """Complete the cached copy of a recorded data set from the data folder; an error if that has another version."""
    if not (lost := cache.lacking(entry.md5)):
        return
    why = f"DVC's cache does not hold {name} as data.dvc names it ({', '.join(lost)} missing)"
    if not (root / name / INDEX).exists():
        raise KshotError(f"{why}, and it is not here either, so it cannot be pushed")
    if verified(name, root).version != entry.version or cache.add(name, str(entry.version)).md5 != entry.md5:
        raise KshotError(f"{why}, and {root / name} is another version: kshot data commit {name}")


def _build(source: str, name: str, root: Path, watch: Callable[[Progress], None]) -> None:
    from kshot.data.importing import ImportReport, import_dataset

    for event in import_dataset(source, name, root):
        if not isinstance(event, ImportReport):
            watch(event)


def _present(name: str, root: Path, how: Literal["was there", "pulled", "built"]) -> Present:
    data_set = verified(name, root)
    named = _committed_version(name, root)
    if named is None or how == "was there":
        return Present(data_set, how, None if named is None else named == data_set.version)
    if named == data_set.version:
        return Present(data_set, how, True)
    import PIL
    from PIL import features

    note = (
        f"{name} was {how}, and it is not what the committed {root.name}.dvc names: version "
        f"{data_set.version[:12]}, not {named[:12]}. Another release of Pillow (here {PIL.__version__}, FreeType "
        f"{features.version('freetype2')}) decodes and draws a little differently, and another kshot may import "
        "differently. Results may differ a little too; the recorded bytes come from a DVC remote: kshot data pull"
    )
    return Present(data_set, how, False, note)


def _committed_version(name: str, root: Path) -> str | None:
    if not root.parent.is_dir():
        return None
    command = ["git", "show", f"HEAD:./{root.name}.dvc"]
    with suppress(OSError, KshotError):  # no git on this machine; a file that cannot be read
        shown = subprocess.run(command, cwd=root.parent, capture_output=True, text=True, check=False)
        sets = Pointer.parse(root.with_name(f"{root.name}.dvc"), shown.stdout if shown.returncode == 0 else "").sets
        return sets[name].version if name in sets else None
    return None


def _write_settings(root: Path) -> None:
    """Write `.dvcignore` (locks, unfinished imports, downloads, contact sheets) and git's merge setting of data.dvc."""
    _add_lines(root.with_name(".dvcignore"), f"/{root.name}/.*", f"/{root.name}/*/{SHEET}")
    if in_git(root):
        _add_lines(root.with_name(".gitattributes"), f"/{root.name}.dvc merge=union")


def _add_lines(file: Path, *lines: str) -> None:
    there = file.read_text() if file.exists() else ""
    if missing := [line for line in lines if line not in there.splitlines()]:
        whole = there if not there or there.endswith("\n") else f"{there}\n"
        file.write_text(whole + "".join(f"{line}\n" for line in missing))


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
