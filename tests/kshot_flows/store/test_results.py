"""Steps as Prefect tasks: kept by content, looked at before they are used again, taken back together, locked."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from kshot_flows.run import embedded
from kshot_flows.store import results
from kshot_flows.store.locks import ProcessLocks
from kshot_flows.store.products import Exported, Pin
from kshot_runtime.errors import KshotError

Write = Callable[[str], Exported]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_api: str) -> Path:
    monkeypatch.setenv("KSHOT_HOME", str(tmp_path))
    return tmp_path


def writing(home: Path, calls: list[str]) -> Write:
    """A task that writes a file named by its text, which is also its key."""

    @results.task(lambda text: f"write-{text}")
    def write(text: str) -> Exported:
        calls.append(text)
        file = home / f"{text}.txt"
        file.write_text(text)
        return Exported((Pin.of(file),), 1.0, 0.0, 1.0)

    return write


def test_a_step_runs_once_and_its_result_is_used_again(home: Path) -> None:
    calls: list[str] = []
    write = writing(home, calls)

    @flow
    def twice() -> tuple[Exported, Exported]:
        return write("a"), write("a")

    with results.journal() as done:
        first, second = twice()
    assert first == second
    assert calls == ["a"]
    assert [step.reused for step in done] == [False, True]


@pytest.mark.parametrize("harm", ["gone", "changed", "unreadable"])
def test_a_result_whose_file_is_not_what_it_was_is_made_anew(home: Path, harm: str) -> None:
    calls: list[str] = []
    write = writing(home, calls)

    @flow
    def once() -> Exported:
        return write("a")

    once()
    if harm == "gone":
        (home / "a.txt").unlink()
    elif harm == "changed":
        (home / "a.txt").write_text("b")
    else:
        (home / ".kshot" / "steps" / "write-a").write_text("{")
    once()
    assert calls == ["a", "a"]
    assert (home / "a.txt").read_text() == "a"


def test_an_error_in_looking_at_a_result_is_told_and_makes_nothing_anew(home: Path) -> None:
    def unreachable(_: Exported) -> bool:
        raise ConnectionError("the registry does not answer")

    calls: list[str] = []
    write = writing(home, calls)

    @flow
    def once() -> Exported:
        return write("a")

    once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exported, "intact", unreachable)
        for call in (once, lambda: results.recalled(once.fn)):
            with pytest.raises(ConnectionError, match="does not answer"):
                call()
    once()
    assert calls == ["a"]


def test_what_was_made_before_a_task_failed_is_used_by_the_next_run(home: Path) -> None:
    calls: list[str] = []
    write = writing(home, calls)

    @results.task(lambda: "fail")
    def fail() -> Exported:
        raise KshotError("no")

    @flow
    def both() -> None:
        write("a")
        fail()

    for _ in range(2):
        with pytest.raises(KshotError, match="no"):
            both()
    assert calls == ["a"]


def test_recalling_finds_all_steps_or_says_that_something_is_left_to_do(home: Path) -> None:
    calls: list[str] = []
    write = writing(home, calls)

    @flow
    def once() -> Exported:
        return write("a")

    assert results.recalled(once.fn) is None
    assert calls == []
    once()
    done = results.recalled(once.fn)
    assert done is not None
    assert [(step.step, step.reused) for step in done] == [("write", True)]
    (home / "a.txt").unlink()
    assert results.recalled(once.fn) is None
    assert calls == ["a"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", f"""
import time
from pathlib import Path
from kshot_flows.store.locks import ProcessLocks
locks = ProcessLocks(Path({str(tmp_path)!r}))
print(locks.acquire_lock("key", "they"), flush=True)
time.sleep(60)
"""], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    locks = ProcessLocks(tmp_path)
    assert locks.is_locked("key")
    assert not locks.acquire_lock("key", "we", acquire_timeout=0.1)
    holder.kill()
    holder.communicate()
    assert locks.acquire_lock("key", "we", acquire_timeout=5)


def test_of_two_with_one_key_the_second_waits_for_the_first(home: Path) -> None:
    calls: list[str] = []
    write = writing(home, calls)
    locks, held = ProcessLocks(home / ".kshot" / "locks"), threading.Event()

    def work_elsewhere() -> None:
        locks.acquire_lock("write-a", "someone else")
        held.set()
        time.sleep(1)
        calls.append("released")
        locks.release_lock("write-a", "someone else")

    @flow
    def once() -> Exported:
        return write("a")

    elsewhere = threading.Thread(target=work_elsewhere)
    elsewhere.start()
    held.wait()
    once()
    elsewhere.join()
    assert calls == ["released", "a"]


def test_a_configured_server_that_does_not_answer_is_an_error_that_says_so() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(
            KshotError, match=r"no Prefect server answers at http://127\.0\.0\.1:1/api.*unset PREFECT_API_URL"
        ),
        embedded.api(),
    ):
        pass
