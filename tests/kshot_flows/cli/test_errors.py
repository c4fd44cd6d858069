"""Every error is a sentence that says what to do; the traceback comes with --debug only."""

import errno
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mlflow import MlflowClient

from kshot_flows.cli import main
from kshot_flows.cli.errors import sentence


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: PT011  (which one is the question)
        call()
    return found.value


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def write_where_nobody_may() -> None:
    raise OSError(errno.EACCES, os.strerror(errno.EACCES), "/x/y")  # to root, all is allowed


def fill_a_database() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA max_page_count = 2")
    try:
        connection.executescript("create table a (x); create table b (x); create table c (x)")
    finally:
        connection.close()


def ask_an_mlflow_that_is_away() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        MlflowClient("http://user:secret@127.0.0.1:9").search_experiments()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (write_to_a_full_disk, r"disk full: /\S* has \d+ MB left; free some and run again: kshot run tiny"),
        (fill_a_database, r"disk full: .* free some and run again: kshot run tiny"),
        (
            lambda: httpx.get("http://127.0.0.1:9"),
            r"Prefect at .* does not answer \(connection refused\).*kshot run tiny",
        ),
        (write_where_nobody_may, r"/x/y: Permission denied\. Change its permissions, or set KSHOT_HOME .*"),
        (lambda: torch.zeros(1 << 60), r"out of memory \(.*run again: kshot run tiny"),
        (lambda: __import__("no_such_module"), r"no_such_module cannot be imported .*kshot\[train\].*"),
        (
            lambda: [][0],
            r"unexpected IndexError: list index out of range\. Run again with `kshot --debug` .*",
        ),
    ],
)
def test_an_error_of_a_library_or_the_system_is_told_in_a_sentence(
    call: Callable[[], Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kshot", "run", "tiny"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = sentence(raised(call))
    assert re.fullmatch(told, found), found
    assert "\n" not in found


def test_servers_that_are_away_are_named_without_their_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    told = sentence(raised(ask_an_mlflow_that_is_away))
    assert told.startswith("MLflow at http://user:***@127.0.0.1:9 does not answer (connection refused)")
    assert "secret" not in told


@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_that_was_cut_off_is_told_as_damaged(tmp_path: Path, size: int) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:size])
    told = sentence(raised(lambda: torch.load(tmp_path / "x.pt")))
    assert told.startswith("a file is damaged ("), told


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_ends_with_a_sentence_and_with_debug_its_traceback_comes_first(tmp_path: Path, debug: bool) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database, but long enough to look like one" * 100)
    command = [sys.executable, "-c", "from kshot_flows.cli.main import main; main()"]
    environment = {**os.environ, "KSHOT_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [*command, *(["--debug"] if debug else []), "models"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("a file is damaged (file is not a database)")
    assert any("Traceback" in line for line in before) == debug
    assert bool(before) == debug


def test_an_end_of_file_is_not_taken_for_a_wish_to_abort(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("kshot_flows.tracking.stores.uri", end)
    monkeypatch.setattr(sys, "argv", ["kshot", "models"])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 1
    assert "a file is damaged" in capsys.readouterr().err
