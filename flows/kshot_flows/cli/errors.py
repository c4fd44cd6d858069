"""Error messages for exceptions of MLflow, Prefect, torch, DVC or the system: what happened and what to do."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kshot_flows import project
from kshot_runtime.errors import KshotError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = re.compile(r"No space left on device|disk is full|Disk quota exceeded|File too large")
_LITTLE = 1 << 20  # bytes of free space below which a disk counts as full
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_ANSWER = re.compile(
    r"Connection refused|Max retries exceeded|timed out|Connection reset|Connection aborted|No route to host"
    r"|Name or service not known|All connection attempts failed|Remote end closed"
)
_NO_MEMORY = re.compile(r"OutOfMemory|can't allocate memory")
_DAMAGED = re.compile(r"malformed|not a database|PytorchStreamReader|zip archive|EOFError|UnpicklingError|truncated")


def sentence(error: BaseException) -> str:
    """The message for an exception: a KshotError's own, or one derived from the exception's type and text."""
    if isinstance(error, KshotError):
        return str(error)
    chain = list(_chain(error))
    text = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    names = {kind.__module__.partition(".")[0] for each in chain for kind in type(each).__mro__}
    again = shlex.join(["kshot", *sys.argv[1:]])
    for each in chain:
        if isinstance(each, KshotError):
            return str(each)
    if full := _full_folder(chain, text):
        left = shutil.disk_usage(full).free / 2**20
        return f"disk full: {full} has {left:.0f} MB left; free some and run again: {again}"
    for each in chain:
        if isinstance(each, ImportError) and not (each.name or "").startswith("kshot"):
            return f"{each.name} cannot be imported ({each}). pip install 'kshot[train]' brings what training needs."
        if isinstance(each, OSError) and each.errno in _DENIED and each.filename:
            return f"{each.filename}: {each.strerror}. Change its permissions, or set KSHOT_HOME to a folder of yours."
        if isinstance(each, MemoryError) or _NO_MEMORY.search(f"{type(each).__name__} {each}"):
            return (
                f"out of memory ({_first_line(each)}). Lower training.episodes_at_once or the backbone's size, or free "
                f"some, and run again: {again}"
            )
    if _NO_ANSWER.search(text):
        from kshot_flows.tracking import stores

        why = stores.reason(text)
        return f"{_place(names, text)} does not answer ({why}). What is finished is kept: start it, and {again}"
    if "database is locked" in text:
        return f"the database is busy: another process has been writing to it for long. Wait for it, and {again}"
    if _DAMAGED.search(text):
        return (
            f"a file is damaged ({_first_line(chain[-1])}). `kshot --debug` shows where it was read. Restore it or "
            f"move it away, and {again}"
        )
    for name, words in {"mlflow": "MLflow", "dvc": "DVC", "prefect": "Prefect", "sqlalchemy": "the database"}.items():
        if name in names:
            return f"{words}: {_first_line(error)}. `kshot doctor` looks what is wrong; `kshot --debug` shows where."
    return (
        f"unexpected {type(error).__name__}: {_first_line(error)}. Run again with `kshot --debug` for the traceback; "
        "please report it."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, down to the first."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            inner = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
            waiting += [one for one in (*inner, each.__cause__ or each.__context__) if one is not None]


def _full_folder(chain: list[BaseException], text: str) -> Path | None:
    """The folder whose disk is full, if that caused an exception."""
    named = [Path(e.filename).parent for e in chain if isinstance(e, OSError) and isinstance(e.filename, str)]
    places = [place for place in (*named, project.home(), Path(tempfile.gettempdir())) if place.is_dir()]
    emptiest = min(places, key=lambda place: shutil.disk_usage(place).free)
    full = any(isinstance(each, OSError) and each.errno in _FULL for each in chain) or _FULL_WORDS.search(text)
    return emptiest if full or shutil.disk_usage(emptiest).free < _LITTLE else None


def _place(names: set[str], text: str) -> str:
    """The server that a failed call addressed."""
    if "mlflow" in names or "/api/2.0/mlflow" in text:
        from kshot_flows.tracking import stores

        return f"MLflow at {stores.public(os.environ.get('MLFLOW_TRACKING_URI', 'its address'))}"
    if names & {"prefect", "httpx", "httpcore"}:
        return f"Prefect at {os.environ.get('PREFECT_API_URL', 'its address')}"
    return "a server"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300].rstrip(".")
