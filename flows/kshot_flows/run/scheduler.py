"""The process of `kshot schedule`: starts due runs of a Prefect deployment, one at a time, as child processes.

Prefect's own runner starts a run for each missed slot, and leaves its children running when it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Schedule
from prefect.settings import (
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_RUNNER_POLL_FREQUENCY,
    get_current_settings,
    temporary_settings,
)
from prefect.states import Cancelled, Crashed, Pending, State
from rich.markup import escape

from kshot_flows import project, recipes
from kshot_flows.console.tables import console
from kshot_flows.pipeline import pipeline
from kshot_flows.run import child, schedules, watching
from kshot_flows.run.server import Server
from kshot_flows.tracking import stores
from kshot_runtime.errors import KshotError

_RUN_SECONDS = 6  # seconds for a run to end before it is killed: the schedule ends within 15 s
_CLOCK_SECONDS = 60  # seconds that the clock may go back without recomputing the slots
_REPLACED_SECONDS = 60  # seconds for an earlier schedule of the recipe to end itself


def serve(
    recipe: str,
    changes: Sequence[str] = (),
    *,
    cron: str | None = None,
    every: str | None = None,
    timezone: str = "UTC",
    notify: str | None = None,
) -> None:
    """Run a recipe whenever it is due, one run at a time, until this process gets a signal to end.

    It replaces an earlier schedule of the recipe. Missed slots, because a run took long or
    because no process ran, are made up for by one run. The recipe is read again for every run.
    """
    schedule, name, server = schedules.when(cron, every, timezone), recipes.load(recipe, changes).name, Server()
    if notify is not None:
        watching.check_address(notify)
    with _signals() as told_to_end:
        serving = _Serving(server, name, told_to_end)
        try:
            server.ensure()
            serving.begin({"recipe": recipe, "changes": list(changes)}, schedule, notify)
            serving.go_on()
        except BaseException:  # a library may have converted `_Ended` to another error
            if not told_to_end.is_set():
                raise
        finally:
            serving.stop()
            server.close()
    _say("Stopped: nothing is scheduled any more. The same command schedules it again.")


class _Ended(BaseException):
    """This process received a signal to end."""


@contextmanager
def _signals() -> Iterator[Event]:
    """Set the event and raise `_Ended`, once, on SIGINT (even if ignored by a shell's background job) or SIGTERM."""
    told_to_end, signals = Event(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        signals.append(signal.SIGHUP)

    def end(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        told_to_end.set()
        raise _Ended

    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield told_to_end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Running(NamedTuple):
    """A run in progress."""

    id: UUID
    process: subprocess.Popen[bytes]
    began: float


class _Serving:
    """A schedule that this process serves."""

    def __init__(self, server: Server, name: str, told_to_end: Event) -> None:
        self.server, self.name, self._told_to_end = server, name, told_to_end
        self.token = (
            f"{project.user()}, process {os.getpid()} ({uuid4().hex[:6]})"  # identifies this process in the deployment
        )
        self._deployment: UUID | None = None
        self._running: _Running | None = None
        self._missed = 0
        self._clock = _clock()
        self._turn = FileLock(project.home() / ".kshot" / "locks" / f"schedule-{name}.lock", thread_local=False)

    def begin(self, parameters: dict[str, object], schedule: Schedule, notify: str | None) -> None:
        """Replace an earlier schedule of the recipe, and print the next times."""
        with self.server.client() as client:
            before = None
            with suppress(ObjectNotFound):
                before = client.read_deployment_by_name(f"{pipeline.name}/{self.name}")
            self._take_turn(client, before)
            missed = 0 if before is None else self._clear(client, before)
            self._deployment = pipeline.to_deployment(
                name=self.name, schedule=schedule, version=self.token, paused=False, tags=["kshot"],
                parameters=parameters, entrypoint_type=EntrypointType.MODULE_PATH,
            ).apply()  # fmt: skip
            watching.mark_the_dead(client)
            watching.forget(client, self._deployment)
            if notify is not None:
                watching.notify(client, notify, self._deployment)
            first = schedules.next_time(schedule)
            _say(
                f"[bold]{self.name}[/bold] runs {schedules.in_words(schedule)} ({schedule.timezone}), next on "
                f"{first:%-d %B %Y at %H:%M:%S}. Ctrl-C ends it. "
                f"{self.server.page('deployments/deployment', self._deployment)}"
            )
            if missed:
                client.create_flow_run_from_deployment(self._deployment)
                _say(f"Runs that were missed, or did not come to an end: {missed}. One run makes up for all of them.")

    def _take_turn(self, client: SyncPrefectClient, before: DeploymentResponse | None) -> None:
        """Become the only process of the project that serves the recipe; an earlier one notices that it is replaced."""
        try:
            self._turn.acquire(timeout=0)
        except Timeout:
            _say(f"{self.name} is scheduled already. Waiting for that schedule to end, which this one replaces.")
            if before is not None:
                client.update_deployment(before.id, DeploymentUpdate(version=self.token))
            try:
                self._turn.acquire(timeout=_REPLACED_SECONDS)
            except Timeout:
                raise KshotError(
                    f"the process that serves {self.name} ({before.version if before else 'unknown'}) has not ended "
                    "within a minute; end it, and try again"
                ) from None

    def _clear(self, client: SyncPrefectClient, before: DeploymentResponse) -> int:
        """End runs of an earlier schedule, and count the missed and crashed ones."""
        missed = 0
        for run in schedules.open_runs(client, before.id):
            late = run.expected_start_time is None or run.expected_start_time <= datetime.now(UTC)
            missed += late
            if run.state_type is not StateType.SCHEDULED:
                _set(client, run.id, Crashed(message="Its process has ended."))
            elif late or not run.auto_scheduled:
                _set(client, run.id, Cancelled(message="A new schedule took its place."))
        client.pause_deployment(before.id)  # removes the runs to come
        return missed

    def go_on(self) -> None:
        """Start due runs until a signal comes, or the schedule is removed or replaced."""
        away, at_once = False, {PREFECT_CLIENT_MAX_RETRIES: 0}
        while not self._told_to_end.is_set():
            try:
                with temporary_settings(at_once), self.server.client() as client:
                    while not self._told_to_end.is_set() and (found := self._ours(client)):
                        self._follow_the_clock(client, found)
                        self._look(client, found)
                        if away:
                            _say("Prefect's server answers again.")
                        away = False
                        self._wait()
                    return
            except httpx.HTTPError as error:
                if not away:
                    _say(f"Prefect's server at {self.server.url} does not answer: {escape(stores.reason(error))}.")
                away = True
                if not self.server.configured:
                    self.server.ensure()
                self._told_to_end.wait(1)

    def _ours(self, client: SyncPrefectClient) -> DeploymentResponse | None:
        """This schedule's deployment; None once it was removed or replaced."""
        assert self._deployment is not None
        try:
            found = client.read_deployment(self._deployment)
        except ObjectNotFound:
            _say(f"The schedule of {self.name} was removed.")
        else:
            if found.version == self.token:
                return found
            _say(f"The schedule of {self.name} was replaced by {found.version}.")
        self._deployment = None
        return None

    def _follow_the_clock(self, client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
        """Recompute the slots after the clock went back; otherwise Prefect would wait until it has caught up."""
        if self._running is not None:
            return
        before, self._clock = self._clock, _clock()
        if (back := before - self._clock) < _CLOCK_SECONDS:
            return
        _say(f"{self._now()} The clock went back by {timedelta(seconds=round(back))}. Slots count from what it shows.")
        if not deployment.paused:
            client.pause_deployment(deployment.id)  # removes the runs to come
            client.resume_deployment(deployment.id)
        self.server.close()  # its services wait for times of the earlier clock
        if not self.server.configured:
            self.server.ensure()

    def _look(self, client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
        """Check the run in progress, drop missed slots, and start a due run."""
        if self._running is not None:
            state = _state(client, self._running.id)
            if state is None or state.is_cancelling():
                child.end(self._running.process, _RUN_SECONDS)
                _set(client, self._running.id, Cancelled(message="Cancelled on its page."))
            if self._running.process.poll() is not None:
                self._finish(client, self._running)
        due = client.get_scheduled_flow_runs_for_deployments([deployment.id], scheduled_before=datetime.now(UTC))
        asked, slots = ([run for run in due if run.auto_scheduled is by_clock] for by_clock in (False, True))
        if deployment.paused:  # Prefect removes its runs to come, and may add some at that very moment
            for run in slots:
                _set(client, run.id, Cancelled(message="The schedule is paused."))
            slots = []
        for run in slots[1:]:
            _set(client, run.id, Cancelled(message="An earlier slot still waits: one run for both."))
        self._missed += len(slots[1:])
        if self._running is None and (asked or slots):
            self._start(client, [*asked, *slots][0])

    def _start(self, client: SyncPrefectClient, run: FlowRun) -> None:
        if client.set_flow_run_state(run.id, Pending()).status is not SetStateStatus.ACCEPT:
            return
        environment = {
            **get_current_settings().to_environment_variables(exclude_unset=True),
            "PREFECT_API_URL": self.server.url,
            "PREFECT_CLIENT_MAX_RETRIES": "5",  # wait up to a minute for the server
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # kshot's tasks print their own progress
            "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        }
        process = child.start("run", str(run.id), environment=environment)
        self._running = _Running(run.id, process, time.monotonic())
        more = f", with {self._missed} missed slots that it makes up for" if self._missed else ""
        due = run.expected_start_time.astimezone() if run.expected_start_time else datetime.now()
        self._missed = 0
        _say(f"{self._now()} starts, due at {due:%H:%M:%S}{more}. {self.server.page('runs/flow-run', run.id)}")

    def _finish(self, client: SyncPrefectClient, run: _Running) -> None:
        """Report how a run ended, and mark it crashed if it did not record its end itself."""
        state, code = _state(client, run.id), run.process.returncode
        if state is None:
            state = Cancelled(message="It was deleted on its page.")
        elif not state.is_final():
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            state = Crashed(message=f"Its process ended {how}.")
            _set(client, run.id, state)
        message = "" if state.name in ("Completed", "Failed") or not state.message else f": {escape(state.message)}"
        _say(f"{self._now()} {state.name} after {time.monotonic() - run.began:.0f} s{message}")
        self._running = None

    def _now(self) -> str:
        return f"{datetime.now():%Y-%m-%d %H:%M:%S} [bold]{self.name}[/bold]"

    def _wait(self) -> None:
        """Wait until the next poll, or until the run in progress ends."""
        deadline = time.monotonic() + PREFECT_RUNNER_POLL_FREQUENCY.value()
        while time.monotonic() < deadline and (self._running is None or self._running.process.poll() is None):
            if self._told_to_end.wait(0.2):
                return

    def stop(self) -> None:
        """End the run in progress, and remove scheduled runs."""
        if self._running is not None:
            child.end(self._running.process, _RUN_SECONDS)
        quick = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
        with quick, suppress(httpx.HTTPError, ObjectNotFound), self.server.client() as client:
            if self._running is not None:
                self._finish(client, self._running)
            if self._deployment is not None:
                client.pause_deployment(self._deployment)
                client.update_deployment(self._deployment, DeploymentUpdate(version=schedules.STOPPED))
        self._turn.release()


def _clock() -> float:
    """Offset between the wall clock and the monotonic clock, in seconds."""
    return time.time() - time.monotonic()


def _state(client: SyncPrefectClient, run: UUID) -> State[Any] | None:
    """The state of a run; None if it was deleted."""
    try:
        return client.read_flow_run(run).state
    except ObjectNotFound:
        return None


def _set(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    with suppress(ObjectNotFound):
        client.set_flow_run_state(run, state, force=True)


def _say(line: str) -> None:
    console().print(line, soft_wrap=True)  # not wrapped, so that the link stays intact
