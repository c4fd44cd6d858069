"""The current project: its folder, its user and its git commit."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from pathlib import Path


def home() -> Path:
    """The project's folder: KSHOT_HOME, or else the current folder."""
    return Path(os.environ.get("KSHOT_HOME") or Path.cwd()).absolute()


def user() -> str:
    """The user for audit entries: KSHOT_USER, or else name@host."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # in a container the user id may have no name
        name = str(os.getuid())
    return os.environ.get("KSHOT_USER") or f"{name}@{socket.gethostname()}"


def git() -> tuple[str | None, bool, str]:
    """The project's commit (None outside git), whether files differ from it, and the difference as a patch."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, False, ""
    return commit.strip(), bool(_git("status", "--porcelain")), (_git("diff", "HEAD") or "")[:1_000_000]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=home(), capture_output=True, text=True, errors="replace")
    except OSError:  # no git on this machine, or no such folder
        return None
    return done.stdout if done.returncode == 0 else None
