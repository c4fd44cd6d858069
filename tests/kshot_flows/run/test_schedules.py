"""Schedules on a real Prefect server, with real processes: when they fire, what they leave out, how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.request import Request, urlopen
from uuid import UUID

import httpx
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running, State
from typer.testing import CliRunner

from kshot.data.importing import finish, import_dataset
from kshot_flows import recipes, registry
from kshot_flows.cli.main import app
from kshot_flows.run import scheduler, schedules, watching
from kshot_flows.run.server import Server
from kshot_runtime.errors import KshotError

ROOT = Path(__file__).parents[3]


def soon(what: Callable[[], Any], seconds: float) -> Any:
    """What this gives as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return found


class Scheduling:
    """`kshot schedule` in a process of its own, started as a script starts one in the background."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.log = home / f"schedule-{time.monotonic_ns()}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("KSHOT_", "MLFLOW_"))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from kshot_flows.cli.main import main; main()", "schedule", *arguments],
                stdout=log, stderr=subprocess.STDOUT, cwd=home, start_new_session=True,
                env={**clean, "OMP_NUM_THREADS": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )  # fmt: skip

    def says(self, text: str, times: int = 1, seconds: float = 120) -> str:
        """Its lines, once they hold `text` so often."""
        soon(lambda: self.log.read_text().count(text) >= times or self.process.poll() is not None, seconds)
        shown = self.log.read_text()
        assert shown.count(text) >= times, shown
        return shown

    def children(self) -> list[int]:
        """The processes that it has started."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(number) for number in listed.stdout.split()]

    def __enter__(self) -> "Scheduling":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Serving(Thread):
    """`kshot serve` of what is in production, and a client that asks without a pause: `answers` has who answered."""

    def __init__(self, home: Path, classes: Path) -> None:
        super().__init__(daemon=True)
        self.answers: list[str] = []
        self._over = Event()
        self._photo = next(classes.rglob("*.png")).read_bytes()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kshot_flows.cli.main import main; main()", "serve", "models:/tiny@production",
             "--port", "0", "--space", classes],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=home,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self) -> None:
        assert self._process.stdout is not None
        url = next(line for line in self._process.stdout if "http://" in line).split()[-1]
        with httpx.Client(base_url=url, timeout=60) as http:
            [space] = http.get("/v1/spaces").json()["spaces"]
            while not self._over.wait(0.1):
                answer = http.post(f"/v1/spaces/{space['id']}/classify", files={"photos": self._photo})
                self.answers.append(answer.json()["model"]["version"] if answer.is_success else answer.text)

    def __enter__(self) -> "Serving":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(60)
        self._process.terminate()
        self._process.communicate(timeout=60)


def alive(process: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def threads(process: int) -> int:
    return len(list(Path(f"/proc/{process}/task").iterdir()))


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"every": "90m"}, "every 1h30m"), ({"every": "1w"}, "every 1w"), ({"cron": "0 3 * * mon"}, "0 3 * * mon")],
)
def test_a_schedule_is_named_as_it_was_asked_for(asked: dict[str, str], words: str) -> None:
    assert schedules.in_words(schedules.when(**{"cron": None, "every": None, **asked}, timezone="UTC")) == words


def test_intervals_count_from_midnight_and_expressions_in_the_time_zone_that_was_asked_for() -> None:
    first = schedules.next_time(schedules.when(None, "6h", "UTC"))
    assert (first.hour % 6, first.minute, first.second) == (0, 0, 0)
    assert first - datetime.now(UTC) < timedelta(hours=6)
    night = schedules.next_time(schedules.when("0 3 * * *", None, "Europe/Berlin"))
    assert (night.hour, night.minute, night.tzname()) in ((3, 0, "CET"), (3, 0, "CEST"))


@pytest.mark.parametrize("cron", ["every night", "61 * * * *", "* * * *", "0 0 30 2 *", ""])
def test_an_expression_that_names_no_time_is_refused_with_an_example(cron: str) -> None:
    with pytest.raises(KshotError, match=r"names no time.*'0 3 \* \* \*'"):
        schedules.when(cron, None, "UTC")


@pytest.mark.parametrize("every", ["", "6", "h6", "6h!", "0s", "1.5h"])
def test_what_is_no_duration_is_refused_with_an_example(every: str) -> None:
    with pytest.raises(KshotError, match=r"is no duration.*30m"):
        schedules.when(None, every, "UTC")


def test_an_unknown_time_zone_and_no_time_at_all_are_refused() -> None:
    with pytest.raises(KshotError, match=r"no time zone 'Mars'.*Europe/Berlin"):
        schedules.when("0 3 * * *", None, "Mars")
    with pytest.raises(KshotError, match=r"--cron '0 3 \* \* \*'.*--every 6h"):
        schedules.when(None, None, "UTC")


@pytest.fixture(scope="module")
def home(new_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose Prefect server runs."""
    made = new_project(tmp_path_factory.mktemp("scheduled") / "project")
    with pytest.MonkeyPatch.context() as patch, temporary_settings(restore_defaults={PREFECT_API_URL}):
        patch.setenv("KSHOT_HOME", str(made))
        server = Server()
        server.ensure()
        yield made
        server.close()


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("KSHOT_HOME", str(home))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        found = Server()
        assert found.runs()
        yield found


@pytest.fixture
def posted() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address, and what is posted there."""
    received: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as hook:
        Thread(target=hook.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hook.server_port}/hook", received
        hook.shutdown()


def runs(server: Server, name: str) -> list[FlowRun]:
    with server.client() as client:
        deployment = client.read_deployment_by_name(f"kshot/{name}")
        found = client.read_flow_runs(limit=200)
    return sorted((run for run in found if run.deployment_id == deployment.id), key=lambda run: run.created)


def listed() -> dict[str, Any]:
    shown = CliRunner().invoke(app, ["schedules", "--json"], catch_exceptions=False)
    return {one["name"]: one for one in json.loads(shown.stdout)}


def test_a_schedule_fires_one_run_at_a_time_and_is_paused_replaced_and_removed(
    home: Path, server: Server, posted: tuple[str, list[dict[str, str]]]
) -> None:
    url, received = posted
    missing = ("tiny.toml", "dataset.name=nowhere")
    with Scheduling(home, *missing, "--every", "2s", "--notify", url) as first:
        first.says("starts, due at")
        with server.client() as client:
            client.create_flow_run_from_deployment(client.read_deployment_by_name("kshot/tiny").id)
        shown = first.says("Failed after", times=2)
        assert "tiny runs every 2s (UTC), next on" in shown
        assert "data set 'nowhere' is not in" in shown
        assert "that it makes up for" in shown  # a run takes longer than two seconds
        for noise in ("at capacity", "WARNING", "ERROR", "Traceback"):
            assert noise not in shown
        link = next(word for word in shown.split() if "/deployments/deployment/" in word)
        with urlopen(Request(link, headers={"Accept": "text/html"})) as page:
            assert page.status == 200
        failed = sorted((run.start_time, run.end_time) for run in runs(server, "tiny") if run.state_name == "Failed")
        assert all(end <= start for (_, end), (start, _) in pairwise(failed))
        cancelled = [run for run in runs(server, "tiny") if run.state_name == "Cancelled"]
        assert {run.state.message for run in cancelled if run.state} == {
            "An earlier slot still waits: one run for both."
        }
        [line, *_] = soon(lambda: received, 30)
        assert re.fullmatch(r"kshot: tiny\S* Failed\. .*'nowhere'.* http:\S+/runs/flow-run/\S+", line["text"])

        assert listed()["tiny"] | {"next": 0, "ended": 0} == {
            "name": "tiny", "recipe": "tiny.toml", "changes": ["dataset.name=nowhere"], "when": "every 2s",
            "timezone": "UTC", "status": "active", "next": 0, "last": "Failed", "ended": 0, "page": link,
        }  # fmt: skip
        schedules.pause("tiny")
        assert listed()["tiny"]["status"] == "paused"
        schedules.resume("tiny")
        assert listed()["tiny"]["status"] == "active"

        with Scheduling(home, *missing, "--cron", "0 3 * * *", "--timezone", "Europe/Berlin") as second:
            second.says("tiny runs 0 3 * * * (Europe/Berlin)")
            assert first.process.wait(20) == 0
            assert "The schedule of tiny was replaced by" in first.log.read_text()
            assert listed()["tiny"]["when"] == "0 3 * * *"
            second.process.send_signal(signal.SIGINT)
            assert second.process.wait(15) == 0
    assert listed()["tiny"]["status"] == "stopped"
    with pytest.raises(KshotError, match=r"nothing serves tiny.*kshot schedule tiny.toml .* --cron '0 3 \* \* \*'"):
        schedules.resume("tiny")
    schedules.remove("tiny")
    assert "tiny" not in listed()
    with pytest.raises(KshotError, match=r"no schedule 'tiny'.*kshot schedules"):
        schedules.pause("tiny")


def test_a_run_without_a_heartbeat_is_marked_crashed_and_bad_ends_are_posted(
    server: Server, posted: tuple[str, list[dict[str, str]]]
) -> None:
    url, received = posted
    pipeline = load_flow_from_entrypoint("kshot_flows.pipeline.pipeline")
    with server.client() as client:
        watching.mark_the_dead(client, timedelta(seconds=10))
        watching.notify(client, url)
        watching.notify(client, url)  # is the same as once
        dead, blocked, well = (
            client.create_flow_run(pipeline, name=name, parameters={"recipe": "tiny"}) for name in "abc"
        )
        for run in (dead, blocked, well):
            client.set_flow_run_state(run.id, Running(), force=True)
        client.set_flow_run_state(blocked.id, Completed(name="Blocked", message="worse than the champion"))
        client.set_flow_run_state(well.id, Completed())

        def crashed() -> State[Any] | None:
            """After one more heartbeat: a busy server may have taken up the automation after the one before."""
            emit_event(
                "prefect.flow-run.heartbeat",
                resource={"prefect.resource.id": f"prefect.flow-run.{dead.id}"},
                related=[{"prefect.resource.id": f"prefect.flow.{dead.flow_id}", "prefect.resource.role": "flow",
                          "prefect.resource.name": "kshot"}],
            )  # fmt: skip
            EventsWorker.drain_all()
            with suppress(AssertionError):
                soon(lambda: (now := client.read_flow_run(dead.id).state) and now.is_crashed(), 25)
            state = client.read_flow_run(dead.id).state
            return state if state and state.is_crashed() else None

        state = soon(crashed, 100)
        assert state.message == "Its process has ended: no heartbeat for 10 s."
        soon(lambda: len(received) >= 2, 60)
        page = server.page("runs/flow-run", blocked.id)
        assert sorted(one["text"] for one in received) == [
            f"kshot: a Crashed. {state.message} {server.page('runs/flow-run', dead.id)}",
            f"kshot: b Blocked. worse than the champion {page}",
        ]


def test_killed_in_training_and_started_with_other_settings_only_these_run_and_a_server_follows(
    home: Path, server: Server, draw: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    passing = [f"gate.{name}=1" for name in ("margin", "ece_margin", "auroc_margin")]
    with Scheduling(home, "tiny.toml", "training.steps=100000", "--every", "3s") as killed:
        killed.says("step 20/100000")
        [run] = killed.children()
        killed.process.kill()
        soon(lambda: not alive(run), 3)
    with Scheduling(home, "tiny.toml", *passing, "--every", "3s") as schedule:
        schedule.says("One run makes up for all of them.")
        schedules.pause("tiny")
        shown = schedule.says("tiny Completed after", seconds=200)
        assert shown.count("starts, due at") == 1
        ran = {run.state_name: run.parameters["changes"] for run in runs(server, "tiny")}
        assert ran["Crashed"] == ["training.steps=100000"]
        assert {name: changes for name, changes in ran.items() if name not in ("Crashed", "Cancelled")} == {
            "Completed": passing
        }
        assert [version.version for version in registry.versions("tiny")] == [1]

        pictures = draw(tmp_path, 1)
        with Serving(home, pictures / "test") as served:
            soon(lambda: served.answers, 60)
            rule = {"size": 16, "channels": 1}
            finish(import_dataset(str(pictures), "patterns", home / "data", rule=rule, replace=True))
            schedules.resume("tiny")
            soon(lambda: served.answers[-1] != "1", 200)
        assert served.answers == sorted(served.answers)
        assert set(served.answers) == {"1", "2"}  # and nothing was refused

        schedule.process.send_signal(signal.SIGTERM)
        assert schedule.process.wait(15) == 0
        assert "Stopped: nothing is scheduled any more." in schedule.log.read_text()


def test_after_the_clock_went_back_the_runs_to_come_are_counted_anew(home: Path, server: Server) -> None:
    serving = scheduler._Serving(server, "tiny", Event())
    serving.begin({"recipe": "tiny.toml", "changes": []}, schedules.when(None, "1h", "UTC"), None)

    def to_come() -> set[UUID]:
        return {run.id for run in runs(server, "tiny") if run.state_name == "Scheduled" and run.auto_scheduled}

    with server.client() as client:
        before = soon(to_come, 60)
        deployment = client.read_deployment_by_name("kshot/tiny")
        serving._follow_the_clock(client, deployment)
        assert before <= to_come()
        serving._clock += 3600  # as if it had been an hour later
        serving._follow_the_clock(client, deployment)
        assert not before & to_come()
        assert soon(to_come, 60)
    serving.stop()
    schedules.remove("tiny")


def test_what_a_killed_process_has_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import time; from kshot_flows.run import child; print(child.start('server', environment={}).pid, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_API_PORT": "1"},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        started = int(parent.stdout.readline())
        soon(lambda: threads(started) > 1, 20)  # it watches
        parent.kill()
    soon(lambda: not alive(started), 3)


def test_the_declared_deployment_names_a_flow_and_a_recipe_that_exist() -> None:
    declared = yaml.safe_load((ROOT / "flows" / "prefect.yaml").read_text())
    for deployment in declared["deployments"]:
        found = load_flow_from_entrypoint(deployment["entrypoint"])
        found.validate_parameters(deployment["parameters"])
        recipes.load(deployment["parameters"]["recipe"], deployment["parameters"]["changes"])
        for each in deployment["schedules"]:
            schedules.when(each["cron"], None, each["timezone"])
        assert deployment["concurrency_limit"]["limit"] == 1
