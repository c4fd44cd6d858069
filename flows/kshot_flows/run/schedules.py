"""Running a recipe on a schedule: the pipeline as a Prefect deployment that this process serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.deployments.runner import EntrypointType
from prefect.schedules import Cron
from prefect.server.schemas.schedules import CronSchedule

from kshot_flows import recipes
from kshot_flows.console import progress
from kshot_flows.pipeline import pipeline
from kshot_flows.run import embedded
from kshot_runtime.errors import KshotError


def serve(recipe: str, changes: Sequence[str] = (), *, cron: str, timezone: str = "UTC") -> None:
    """Run a recipe whenever `cron` says, one run at a time, until this process is stopped.

    A run that is due while another goes on waits for its end. The recipe is read anew for every run.
    """
    [first] = next_times(cron, timezone, 1)
    name = recipes.load(recipe, changes).name
    with embedded.api(schedules=True) as url:
        progress.say(f"[bold]{name}[/bold] runs at {cron} ({timezone}), first on {first:%-d %B %Y at %H:%M}.")
        progress.say(f"[dim]Prefect's API is at {url}. Ctrl-C ends the schedule.[/dim]")
        pipeline.serve(
            name=name,
            schedule=Cron(cron, timezone=timezone),
            parameters={"recipe": recipe, "changes": list(changes)},
            limit=1,
            entrypoint_type=EntrypointType.MODULE_PATH,
            print_starting_message=False,
        )
        progress.say("Stopped: nothing is scheduled any more. The same command schedules it again.")


def next_times(cron: str, timezone: str, count: int) -> list[datetime]:
    """The next times that an expression names; an expression that names none is an error."""
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise KshotError(f"there is no time zone {timezone!r}; one is written like Europe/Berlin, or UTC") from None
    try:
        return list(asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(count)))
    except ValueError:
        raise KshotError(
            f"{cron!r} names no time. A cron expression has five parts, minute, hour, day, month and weekday, such as "
            "'0 3 * * *' (every night at three) or '*/30 * * * mon-fri' (every half hour on workdays)."
        ) from None
