"""Dataset versions: DVC records the data folder in one pointer, `data.dvc`, which git keeps; and the way back from it.

Only this module knows DVC. Every use of it goes through `_dvc`: absolute paths, one at a time, patient with locks.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from filelock import FileLock

from kshot.datasets import INDEX, SHEET, ImageSet, data_sets, file_sha256
from kshot_flows import project
from kshot_runtime.errors import KshotError

if TYPE_CHECKING:
    from kshot.importing import Progress

_KEY = "data sets"  # in data.dvc, under `meta`, which DVC keeps as it is: each data set's own version


def data_root() -> Path:
    """Where data sets lie: KSHOT_DATA, or else `data` in the project, which is KSHOT_HOME or the current folder."""
    if chosen := os.environ.get("KSHOT_DATA"):
        return Path(chosen).absolute()
    return project.home() / "data"


@dataclass(frozen=True)
class Recorded:
    """What DVC calls the data folder."""

    md5: str | None  # '....dir'; None where there is no DVC
    why_not: str = ""  # why there is no md5


@dataclass(frozen=True)
class Present:
    """How a data set came to be in the data folder."""

    data_set: ImageSet
    how: Literal["was there", "pulled", "built"]
    same: bool | None  # whether it is what the committed data.dvc names; None if that does not name it
    note: str = ""  # what to say about it


def version_data(root: Path) -> Recorded:
    """Record the data folder as it is now in data.dvc (`dvc add`), and say by what name."""
    if why_not := _why_not_versioned(root):
        return Recorded(None, why_not=why_not)
    if not data_sets(root):
        raise KshotError(f"{root} holds no data set yet. Bring one in: kshot data import SOURCE NAME")
    with _dvc(root) as repo:
        _write_ignored(root)
        repo.add(str(root))
    _write_versions(root)
    return Recorded(recorded(root))


def recorded(root: Path) -> str | None:
    """The name of the data folder in data.dvc, without asking DVC; None if there is no data.dvc."""
    pointer = _pointer(root)
    return _md5(pointer.read_text()) if pointer.exists() else None


def versioned(root: Path) -> bool:
    """Whether the data folder lies in a DVC repository."""
    return _repository(root) is not None


def ensure(
    name: str, root: Path, source: str | None = None, watch: Callable[[Progress], None] = lambda progress: None
) -> Present:
    """The data set of this name: there already, or pulled if a remote has it, or else built by its source.

    `source` is `name` unless said otherwise. What was pulled or built is compared with what the committed data.dvc
    names; a difference is told, and no error: the data set is sound, only not the same.
    """
    root.mkdir(parents=True, exist_ok=True)
    if (root / name / INDEX).exists():
        return _present(name, root, "was there")
    failed = _try_pull(name, root)
    if failed is None:
        return _present(name, root, "pulled")
    with FileLock(_lock_folder(root) / f"ensure-{name}"):
        if (root / name / INDEX).exists():  # built meanwhile by someone else
            return _present(name, root, "was there")
        try:
            _build(source or name, name, root, watch)
        except KshotError as error:
            raise KshotError(f"data set {name!r} is not in {root}; {failed}; and building it: {error}") from None
    return _present(name, root, "built")


def push(root: Path) -> int:
    """Copy what data.dvc names to the DVC remote; the number of files that were new there."""
    _need_remote(root)
    if not recorded(root):
        raise KshotError(f"{_pointer(root)} is missing: nothing is recorded yet that could be pushed")
    with _dvc(root) as repo:
        return int(repo.push())


def pull(root: Path) -> dict[str, Any]:
    """Make the data folder what data.dvc names, unless that would remove what no version records."""
    _need_remote(root)
    if not recorded(root):
        raise KshotError(f"{_pointer(root)} is missing: nothing is recorded that could be pulled. Is it committed?")
    try:
        with _dvc(root) as repo:
            return dict(repo.pull()["stats"])
    except KshotError as error:
        if "unsaved files" not in str(error):
            raise
        raise KshotError(
            f"a pull would remove data that no version records ({'; '.join(differences(root))}). "
            f"Move it away, or record it: dvc add {root.name}"
        ) from None


def differences(root: Path) -> list[str]:
    """How the data folder differs from data.dvc; empty if it does not, or if there is no data.dvc."""
    if _why_not_versioned(root) or not recorded(root):
        return []
    with _dvc(root) as repo:
        (output,) = repo.find_outs_by_path(str(root))
        if not output.workspace_status():
            return []
    named, here = _named_versions(_pointer(root).read_text()), _versions(root)
    found = [f"{n}: not recorded" for n in sorted(here.keys() - named.keys())]
    found += [f"{n}: missing" for n in sorted(named.keys() - here.keys())]
    found += [f"{n}: changed" for n in sorted(named.keys() & here.keys()) if named[n] != here[n]]
    return found or [f"{root} holds other bytes than were recorded"]


# ---- DVC


@contextmanager
def _dvc(root: Path) -> Iterator[Any]:
    """The DVC repository around the data folder, for one user at a time; its errors become messages."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    with FileLock(_lock_folder(root) / "dvc"):
        try:
            repo = Repo(str(_repository(root)), _wait_for_lock=True)
            try:
                repo.scm_context.quiet = True  # its hint about `git add` is not meant for a pipeline
                yield repo
            finally:
                repo.close()
        except (DvcException, SCMError) as error:
            raise KshotError(f"DVC: {error}") from error


def _repository(root: Path) -> Path | None:
    """The nearest folder around the data folder that `dvc init` was called in."""
    return next((folder for folder in root.parents if (folder / ".dvc").is_dir()), None)


def _why_not_versioned(root: Path) -> str:
    if versioned(root):
        return ""
    in_git = any((folder / ".git").exists() for folder in root.parents)
    start = "dvc init" if in_git else "git init && dvc init, or dvc init --no-scm"
    return f"{root} is in no DVC repository, so it has no version there. To start one: {start}"


def _need_remote(root: Path) -> None:
    if why_not := _why_not_versioned(root):
        raise KshotError(why_not)
    if not _has_remote(root):
        raise KshotError("no DVC remote is configured. Give it one, such as: dvc remote add -d store s3://bucket/path")


def _has_remote(root: Path) -> bool:
    with _dvc(root) as repo:
        return bool(repo.config["core"].get("remote"))


def _try_pull(name: str, root: Path) -> str | None:
    """Pull one data set; why not, if that could not be."""
    if why_not := _why_not_versioned(root):
        return why_not
    pointer = _pointer(root)
    if not pointer.exists() or name not in _named_versions(pointer.read_text()):
        return f"{pointer.name} does not name it"
    if not _has_remote(root):
        return "no DVC remote is configured to pull it from"
    try:
        with _dvc(root) as repo:
            repo.pull(str(root / name))
    except KshotError as error:
        return f"it could not be pulled ({error})"
    return None if (root / name / INDEX).exists() else "the DVC remote does not have it"


def _build(source: str, name: str, root: Path, watch: Callable[[Progress], None]) -> None:
    from kshot.importing import ImportReport, import_dataset

    for event in import_dataset(source, name, root):
        if not isinstance(event, ImportReport):
            watch(event)


# ---- what data.dvc says


def _pointer(root: Path) -> Path:
    return root.with_name(root.name + ".dvc")


def _md5(text: str) -> str | None:
    try:
        return str(yaml.safe_load(text)["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        return None


def _committed_pointer(root: Path) -> str | None:
    pointer = _pointer(root)
    if not pointer.parent.is_dir():
        return None
    command = ["git", "show", f"HEAD:./{pointer.name}"]
    try:
        shown = subprocess.run(command, cwd=pointer.parent, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return shown.stdout if shown.returncode == 0 else None


def _versions(root: Path) -> dict[str, str]:
    return {name: file_sha256(root / name / INDEX) for name in data_sets(root)}


def _named_versions(text: str) -> dict[str, str]:
    try:
        return dict((yaml.safe_load(text).get("meta") or {}).get(_KEY) or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        return {}


def _write_versions(root: Path) -> None:
    """Note each data set's version in data.dvc; what DVC and its users wrote there stays as it is."""
    from dvc.utils.serialize import modify_yaml

    pointer = _pointer(root)
    if _named_versions(pointer.read_text()) != (versions := _versions(root)):
        with modify_yaml(str(pointer)) as content:
            content.setdefault("meta", {})[_KEY] = versions


def _write_ignored(root: Path) -> None:
    """Keep what is no data out of DVC: locks, imports under way, downloads, contact sheets."""
    file = root.with_name(".dvcignore")
    there = file.read_text() if file.exists() else ""
    missing = {f"/{root.name}/.*", f"/{root.name}/*/{SHEET}"} - set(there.splitlines())
    if missing:
        whole = there if not there or there.endswith("\n") else f"{there}\n"
        file.write_text(whole + "".join(f"{pattern}\n" for pattern in sorted(missing)))


def _present(name: str, root: Path, how: Literal["was there", "pulled", "built"]) -> Present:
    data_set = ImageSet.open(root / name)
    text = _committed_pointer(root)
    named = _named_versions(text).get(name) if text else None
    if named is None or how == "was there":
        return Present(data_set, how, None if named is None else named == data_set.version)
    if named == data_set.version:
        return Present(data_set, how, True)
    import PIL
    from PIL import features

    note = (
        f"{name} was {how}, and it is not what the committed {_pointer(root).name} names: version "
        f"{data_set.version[:12]}, not {named[:12]}. Another release of Pillow (here {PIL.__version__}, FreeType "
        f"{features.version('freetype2')}) decodes and draws a little differently, and another kshot may import "
        "differently. Results may differ a little too; the recorded bytes come from a DVC remote: kshot data pull"
    )
    return Present(data_set, how, False, note)


def _lock_folder(root: Path) -> Path:
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
