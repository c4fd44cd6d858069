"""Schedules as Prefect deployments of the pipeline: list, pause, resume, remove."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron, Interval, Schedule
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule

from kshot_flows.pipeline import pipeline
from kshot_flows.run import embedded, watching
from kshot_flows.run.server import Server
from kshot_runtime.errors import KshotError

STOPPED = "stopped"  # version of a deployment that no process serves; otherwise the version names that process
_UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_MONDAY = datetime(2024, 1, 1)  # intervals are counted from its midnight, so that a restart does not move them
_UNSEEN = timedelta(seconds=60)  # longest interval between two polls of a process that serves a schedule
_ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)


@dataclass(frozen=True)
class Listed:
    """The state of a schedule."""

    name: str
    recipe: str
    changes: list[str]
    when: str
    timezone: str
    status: str  # active, paused, or stopped (no process serves it)
    next: datetime | None
    last: str | None  # how its last run ended
    ended: datetime | None
    page: str | None

    @property
    def command(self) -> str:
        """The command that serves the schedule again."""
        option = "--every" if self.when.startswith("every ") else "--cron"
        zone = [] if self.timezone == "UTC" else ["--timezone", self.timezone]
        when = self.when.removeprefix("every ")
        return shlex.join(["kshot", "schedule", self.recipe, *self.changes, option, when, *zone])


def when(cron: str | None, every: str | None, timezone: str) -> Schedule:
    """The Prefect schedule of a cron expression or an interval; an invalid expression is an error."""
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise KshotError(f"there is no time zone {timezone!r}; one is written like Europe/Berlin, or UTC") from None
    if (cron is None) == (every is None):
        raise KshotError("say when, in one way: --cron '0 3 * * *' (every night at three), or --every 6h")
    if every is not None:
        return Interval(_duration(every), anchor_date=_MONDAY.replace(tzinfo=zone), timezone=timezone)
    try:
        schedule = Cron(cron or "", timezone=timezone)
        next_time(schedule)
    except ValueError:
        raise KshotError(
            f"{cron!r} names no time. A cron expression has five parts, minute, hour, day, month and weekday, such as "
            "'0 3 * * *' (every night at three) or '*/30 * * * mon-fri' (every half hour on workdays)."
        ) from None
    return schedule


def next_time(schedule: Any) -> datetime:
    """The next time that the schedule is due."""
    kind = CronSchedule if _cron(schedule) else IntervalSchedule
    fields = {name: getattr(schedule, name) for name in kind.model_fields if hasattr(schedule, name)}
    [first] = asyncio.run(kind(**fields).get_dates(1))
    return first


def in_words(schedule: Any) -> str:
    """`every 1d12h`, or a cron expression."""
    if cron := _cron(schedule):
        return cron
    seconds, text = round(schedule.interval.total_seconds()), ""
    for unit, name in _UNITS.items():
        number, seconds = divmod(seconds, round(timedelta(**{name: 1}).total_seconds()))
        text += f"{number}{unit}" if number else ""
    return f"every {text}"


def listed() -> list[Listed]:
    """All schedules of the pipeline, by name."""
    with _records() as (client, server):
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[pipeline.name])))
        return sorted((_listed(client, one, server) for one in found), key=lambda one: one.name)


def pause(name: str) -> None:
    """Pause a schedule: no runs start until it is resumed."""
    with _records() as (client, server):
        found = _find(client, name)
        if _listed(client, found, server).status == STOPPED:
            raise KshotError(f"nothing serves {name}, so nothing runs; `kshot schedules remove {name}` forgets it")
        client.pause_deployment(found.id)


def resume(name: str) -> None:
    """Resume a paused schedule."""
    with _records() as (client, server):
        found = _find(client, name)
        if (one := _listed(client, found, server)).status == STOPPED:
            raise KshotError(f"nothing serves {name}. This does, for as long as it lives: {one.command}")
        client.resume_deployment(found.id)


def remove(name: str) -> None:
    """Remove a schedule; its process ends, including a run in progress."""
    with _records() as (client, _):
        found = _find(client, name)
        watching.forget(client, found.id)
        client.delete_deployment(found.id)  # with its runs to come


def watch(notify: str | None) -> None:
    """Configure the server to watch the runs of workers; see `watching`."""
    server = Server()
    if not server.configured:
        raise KshotError("workers need a Prefect server: start one, set PREFECT_API_URL, and try again")
    with _records() as (client, _):
        watching.mark_the_dead(client)
        if notify is not None:
            watching.notify(client, notify)


def open_runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Unfinished runs of a deployment."""
    found: list[FlowRun] = []
    states = [state for state in StateType if state not in (*_ENDED, StateType.CANCELLED)]
    while more := _runs(client, deployment, states, offset=len(found)):
        found += more
    return found


@contextmanager
def _records() -> Iterator[tuple[SyncPrefectClient, Server | None]]:
    """A client of the running server, or of the project's own database if none runs."""
    server = Server()
    if not server.configured and server.runs():
        with server.client() as client:
            yield client, server
    else:
        with embedded.api(), get_client(sync_client=True) as client:
            yield client, server if server.configured else None


def _find(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(f"{pipeline.name}/{name}")
    except ObjectNotFound:
        raise KshotError(f"there is no schedule {name!r}; `kshot schedules` lists them") from None


def _listed(client: SyncPrefectClient, found: DeploymentResponse, server: Server | None) -> Listed:
    schedule = next((one.schedule for one in found.schedules), None)
    seen = found.last_polled is not None and datetime.now(UTC) - found.last_polled < _UNSEEN
    served = server is not None and seen and found.version != STOPPED
    status = STOPPED if not served else "paused" if found.paused else "active"
    last = _runs(client, found.id, _ENDED, sort=FlowRunSort.END_TIME_DESC, limit=1)
    return Listed(
        name=found.name,
        recipe=str(found.parameters.get("recipe", "")),
        changes=list(found.parameters.get("changes") or []),
        when=in_words(schedule) if schedule else "",
        timezone=getattr(schedule, "timezone", None) or "UTC",
        status=status,
        next=next_time(schedule) if schedule and status == "active" else None,
        last=last[0].state_name if last else None,
        ended=last[0].end_time if last else None,
        page=server.page("deployments/deployment", found.id) if server else None,
    )


def _runs(client: SyncPrefectClient, deployment: UUID, states: Sequence[StateType], **how: Any) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))),
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        **how,
    )


def _cron(schedule: Any) -> str | None:
    """The cron expression of any of Prefect's types of schedules; None for an interval."""
    return getattr(schedule, "cron", None)


def _duration(text: str) -> timedelta:
    found = re.findall(r"(\d+)([wdhms])", text)
    length = timedelta(**{_UNITS[unit]: int(number) for number, unit in found})
    if "".join(map("".join, found)) != text or not length:
        raise KshotError(f"{text!r} is no duration. One is written like 6h, 90s, 30m, 1d12h or 2w.")
    return length
