"""DVC's cache and remotes: copies data sets between folder, cache and remote, and verifies that they arrived.

Only this module imports DVC, whose `add`, `push` and `fetch` only log failed copies. So every copy ends
with a check of each object at its destination.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kshot.data.datasets import INDEX, file_sha256
from kshot_flows.console import progress
from kshot_flows.data import extras
from kshot_flows.data.pointer import Entry
from kshot_runtime.errors import KshotError

_PATIENCE = 3.0  # seconds of waiting for another process before it is reported


class Cache:
    """The DVC repository around a data folder, while it is open."""

    def __init__(self, repo: Any, root: Path, heard: list[str]) -> None:
        self._repo = repo
        self._root = root
        self._heard = heard  # DVC's log lines, for error messages

    def add(self, name: str, version: str) -> Entry:
        """Copy a data set into the cache."""
        from dvc.output import Output
        from dvc.stage import Stage

        folder = self._root / name
        self._repo.scm_context.ignore(str(self._root))
        stage = Stage(self._repo, path=f"{self._root}.dvc", wdir=str(self._root.parent))
        with FileLock(lock_folder(self._root) / name):  # so that no import replaces it meanwhile
            out = Output(stage, str(folder))
            out.save()
            out.commit(relink=False)
            if file_sha256(folder / INDEX) != version:
                raise KshotError(f"{name} was imported anew while it was being recorded; record it again")
            md5 = out.hash_info.value
            if lost := self.lacking(md5):
                where = self._repo.cache.local.path
                raise KshotError(
                    f"{name} was not recorded: DVC's cache {where} did not take {', '.join(lost)}{self._why()}. "
                    "Make room, or move the cache (dvc cache dir), and do it again"
                )
            # the links that `dvc config cache.type` selects
            if self._repo.cache.local.cache_types[0] in ("hardlink", "symlink"):
                out.commit(relink=True)
        return Entry(md5, version, out.meta.nfiles, out.meta.size)

    def part(self, md5: str, name: str) -> Entry:
        """The hash of one data set in a folder that was recorded as a whole."""
        from dvc_data.hashfile.db import add_update_tree

        here = self._repo.cache.local
        if self._tree(md5) is None:
            with self._using() as there:
                self._copy(there, here, {self._info(md5)}, verify=True)
        if (whole := self._tree(md5)) is None or (tree := whole.get_obj(here, (name,))) is None:
            raise KshotError(f"the remote {self.url()} does not have the list of its files{self._why()}")
        add_update_tree(here, tree)
        return Entry(tree.oid, None, len(tree))

    def lacking(self, md5: str, only: str | None = None, there: Any = None, read: bool = False) -> list[str]:
        """The files of a recorded folder that are missing or incomplete in the cache, or in the remote `there`.

        With `read`, every byte of them is read, and a damaged one is removed from the cache.
        """
        from dvc_objects.errors import ObjectFormatError

        local = self._repo.cache.local
        if (tree := self._tree(md5)) is None:
            return ["its list of files"]
        if there:
            _forget_listings(there)
        objects = {"/".join(key): info.value for key, _, info in tree if only in (None, key[0])}
        lost = []
        for file, oid in {**objects, "its list of files": md5}.items():
            try:
                if read and not oid.startswith(_md5(path := Path(local.oid_to_path(oid)))):
                    path.unlink()
                    lost.append(file)
                elif not there:
                    local.check(oid)
                elif there.fs.size(there.oid_to_path(oid)) != local.fs.size(local.oid_to_path(oid)):
                    lost.append(file)
            except (FileNotFoundError, ObjectFormatError):
                lost.append(file)
        return lost

    def push(self, md5: str, remote: str | None = None) -> int:
        """Copy a recorded folder from the cache to a remote; returns the number of new files there."""
        with self._using(remote) as there:
            sent = self._copy(self._repo.cache.local, there, {self._info(md5)}, shallow=False)
            lost = self.lacking(md5, there=there)
        if lost:
            why = self._why() or ". What is there of that is torn: remove it there, and push again"
            raise KshotError(f"the remote {self.url(remote)} does not hold {', '.join(lost)} in full{why}")
        return sent

    def fetch(self, md5: str, only: str | None = None, remote: str | None = None) -> None:
        """Copy a recorded folder, or one data set of it, from a remote to the cache."""
        with self._using(remote) as there:
            self._copy(there, self._repo.cache.local, {self._info(md5)}, verify=True)
            if (tree := self._tree(md5)) is not None:
                files = {info for key, _, info in tree if only in (None, key[0])}
                self._copy(there, self._repo.cache.local, files, verify=True)
        if lost := self.lacking(md5, only):
            raise KshotError(
                f"the remote {self.url(remote)} did not give {', '.join(lost)}{self._why()}; was it pushed?"
            )

    def checkout(self, name: str, anew: tuple[str, ...] = ()) -> None:
        """Check out a data set's recorded version from the cache; some files even if DVC sees no change."""
        with FileLock(lock_folder(self._root) / name):
            for file in anew:
                (self._root / name / file).unlink(missing_ok=True)
            self._repo.checkout(targets=[str(self._root / name)])

    def url(self, remote: str | None = None) -> str:
        """The remote's URL; an error if there is none."""
        name = remote or self._repo.config["core"].get("remote")
        if not name:
            raise KshotError(
                "no DVC remote is configured. Give it one, such as: dvc remote add -d store s3://bucket/path"
            )
        return str(self._repo.config["remote"][name]["url"])

    def reached(self) -> bool:
        """Whether the remote exists; an error if it cannot be used."""
        with self._using() as there:
            return bool(there.fs.exists(there.path))

    @contextmanager
    def _using(self, name: str | None = None) -> Iterator[Any]:
        """The remote, for the block; errors inside become an error that names it."""
        url = self.url(name)
        if why_not := extras.missing(url, dvc=True):
            raise KshotError(why_not)
        try:
            yield self._repo.cloud.get_remote_odb(name)
        except Exception as error:
            raise KshotError(f"the remote {url} could not be used: {_sentence(error)}") from error

    def _copy(self, source: Any, target: Any, objects: set[Any], **options: Any) -> int:
        """Copy objects that the target lacks, ignoring DVC's index of the remote, which may be outdated."""
        from dvc_data.hashfile.transfer import transfer

        self._heard.clear()
        return len(transfer(source, target, objects, cache_odb=self._repo.cache.local, **options).transferred)

    def _tree(self, md5: str) -> Any:
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        try:
            return Tree.load(self._repo.cache.local, self._info(md5))
        except (FileNotFoundError, ObjectFormatError):
            return None

    def _info(self, md5: str) -> Any:
        from dvc_data.hashfile.hash_info import HashInfo

        return HashInfo("md5", md5)

    def _why(self) -> str:
        return f" ({self._heard[-1]})" if self._heard else ""


@contextmanager
def opened(root: Path, repository: Path) -> Iterator[Cache]:
    """The DVC repository around the data folder, locked for one process; errors become a KshotError."""
    try:
        with _alone(root), ExitStack() as stack:
            from dvc.lock import LockError
            from dvc.repo import Repo, lock_repo

            heard = stack.enter_context(_heard())
            repo = Repo(str(repository))
            stack.callback(repo.close)
            repo.scm_context.quiet = True  # its hint about `git add` is for interactive use
            for attempt in count():
                with suppress(LockError):  # after 3 seconds
                    stack.enter_context(lock_repo(repo))
                    break
                if not attempt:
                    progress.say("  another DVC command is at work; waiting")
            yield Cache(repo, root, heard)
    except KshotError:
        raise
    except Exception as error:  # of DVC, and of storage, databases and packages that it uses
        raise KshotError(f"{'' if isinstance(error, OSError) else 'DVC: '}{_sentence(error)}") from error


def lock_folder(root: Path) -> Path:
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    lock = FileLock(lock_folder(root) / "~dvc")  # no data set has such a name
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        progress.say("  another kshot command is at work in the data folder; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect warnings and errors logged by DVC and storage libraries, without printing them."""
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    loggers += [root] if not (root := logging.getLogger()).handlers else []
    kept = [(logger.handlers, logger.propagate) for logger in loggers]
    listener = _Listener()
    for logger in loggers:
        logger.handlers, logger.propagate = [listener], False
    try:
        yield listener.heard
    finally:
        for logger, (handlers, propagate) in zip(loggers, kept, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and str(error.filename2).endswith(".tmp"):  # a partial file on a full disk
            with suppress(OSError):
                Path(error.filename2).unlink()
        self.heard.append(_sentence(error) if error else " ".join(record.getMessage().split()))


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _forget_listings(odb: Any) -> None:
    """Clear the remote file system's cache of folder listings."""
    if forget := getattr(odb.fs.fs, "invalidate_cache", None):
        forget()
