"""Prefect automations: mark dead runs as crashed, and notify about failed or blocked ones."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import StateType

from kshot_flows.pipeline import pipeline
from kshot_runtime.errors import KshotError

SILENCE = timedelta(minutes=10)  # more than three times what Prefect has between heartbeats, 180 s
_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
_OURS = {"prefect.resource.role": "flow", "prefect.resource.name": pipeline.name}
_BAD_ENDS = ("Blocked", "Failed", "TimedOut", "Crashed")


def mark_the_dead(client: SyncPrefectClient, silence: timedelta = SILENCE) -> None:
    """Make the server mark runs as crashed after this long without a heartbeat."""
    trigger = EventTrigger(
        match=_RUNS, match_related=_OURS, for_each={"prefect.resource.id"}, posture=Posture.Proactive, within=silence,
        after={"prefect.flow-run.heartbeat"}, expect={"prefect.flow-run.*"},
    )  # fmt: skip
    message = f"Its process has ended: no heartbeat for {silence.total_seconds():.0f} s."
    mark = ChangeFlowRunState(state=StateType.CRASHED, message=message)
    _put(client, AutomationCore(name="kshot: runs that died", trigger=trigger, actions=[mark]))


def check_address(url: str) -> None:
    """Refuse an invalid webhook address."""
    if not url.startswith(("http://", "https://")):
        raise KshotError(
            f"{url!r} is no address that takes a POST: one begins with https:// or http://. For mail and chat "
            "services see docs/schedules.md."
        )


def notify(client: SyncPrefectClient, url: str, deployment: UUID | None = None) -> None:
    """Make the server POST JSON to `url` when a run (of this deployment, or any of kshot's) fails or is blocked."""
    check_address(url)
    text = "{{subject}} {{body}}"
    block = CustomWebhookNotificationBlock(
        name="kshot", url="{{url}}", secrets={"url": url}, json_data={"text": text, "content": text}
    ).save(_block(deployment), overwrite=True)  # fmt: skip
    about = {} if deployment is None else {"owner_resource": f"prefect.deployment.{deployment}"}  # is removed with it
    trigger = EventTrigger(
        match=_RUNS,
        match_related={"prefect.resource.id": about["owner_resource"]} if about else _OURS,
        expect={f"prefect.flow-run.{end}" for end in _BAD_ENDS},
        posture=Posture.Reactive,
    )
    send = SendNotification(
        block_document_id=block,
        subject="kshot: {{ flow_run.name }} {{ flow_run.state.name }}.",
        body="{{ flow_run.state.message }} {{ flow_run|ui_url }}",
    )
    name = f"kshot: notify about {deployment or 'all runs'}"
    _put(client, AutomationCore(name=name, trigger=trigger, actions=[send], **about))


def forget(client: SyncPrefectClient, deployment: UUID) -> None:
    """Remove the automations and blocks of a deployment."""
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment}")
    with suppress(ObjectNotFound):
        block = client.read_block_document_by_name(_block(deployment), "custom-webhook")
        client.delete_block_document(block.id)


def _block(deployment: UUID | None) -> str:
    return f"kshot-{deployment or 'all'}"


def _put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create an automation, or update the one of the same name."""
    [*before] = client.read_automations_by_name(automation.name)
    if before:
        client.update_automation(before[0].id, automation)
    else:
        client.create_automation(automation)
