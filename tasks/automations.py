"""What the Prefect server does by itself: it crashes runs that fell silent, and tells people how runs ended.

    python -m train_and_ship.tasks.automations     # `ship up` runs it when something changed

The automations are in the Prefect UI, where they can be paused; running this again keeps them so. Each is found again
by its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from uuid import UUID

from apprise import Apprise
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from train_and_ship.infra.errors import SettingsError, ShipError
from train_and_ship.infra.prefect_events import ASKED, KEPT, PROMOTED, ROLLOUT, UNCHANGED
from train_and_ship.infra.settings import Settings
from train_and_ship.tasks.notification import NotificationAddress

MOVING, WATCHING = ("train-and-ship", "retrain", "rollback", "promote"), ("watch",)
UNWATCHED, UNWATCHED_WITHIN = 10, timedelta(minutes=15)
"""Runs of the flow that watches rollouts may fail so often before people are told: there is one each minute, each does
what the one before did not, and all of them fail while the bucket is away."""
RUNS = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
BAD_ENDS = ResourceSpecification(
    {"prefect.resource.id": "prefect.flow-run.*", "prefect.state-type": ["FAILED", "CRASHED"]}
)
"""By type: Prefect calls events after a state's name, which may be another one."""
BLOCK = "train-and-ship"
PREFIX = "train-and-ship: "


def _flows(names: Sequence[str]) -> ResourceSpecification:
    """A server may have other people's flows too."""
    return ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": list(names)})


def automations(settings: Settings, block: UUID | None) -> Iterator[AutomationCore]:
    """block: the document of the addresses; None when nobody wants to be told."""
    yield _crash_the_silent(settings.silent_seconds)
    if block is None:
        return
    yield _notify(
        "a run failed",
        _ends_badly(MOVING),
        block,
        "{{ flow.name }} {{ flow_run.parameters.job or flow_run.parameters.model }}: {{ flow_run.state.name }}",
        last := f"{{{{ flow_run.state.message }}}}\n\n{settings.prefect_ui_url}/runs/flow-run/{{{{ flow_run.id }}}}",
    )
    yield _notify(
        "nobody watches rollouts",
        _ends_badly(WATCHING, UNWATCHED, UNWATCHED_WITHIN),
        block,
        f"watch: {UNWATCHED} runs failed, and rollouts stay as they are",
        last,
    )
    for title, event in (
        ("a release went live", PROMOTED),
        ("a rollout began or was given up", ROLLOUT),
        ("a candidate was not better", KEPT),
        ("a person is asked", ASKED),
        ("nothing new for long", UNCHANGED),
    ):
        trigger = EventTrigger(expect={event}, posture=Posture.Reactive, threshold=1)
        yield _notify(title, trigger, block, "{{ event.payload.subject }}", "{{ event.payload.body }}")


def _ends_badly(names: Sequence[str], times: int = 1, within: timedelta = timedelta(0)) -> EventTrigger:
    return EventTrigger(
        expect={"prefect.flow-run.*"}, match=BAD_ENDS, match_related=_flows(names), posture=Posture.Reactive,
        threshold=times, within=within,
    )  # fmt: skip


def _notify(title: str, trigger: EventTrigger, block: UUID, subject: str, body: str) -> AutomationCore:
    action = SendNotification(block_document_id=block, subject=subject, body=body)
    return AutomationCore(name=PREFIX + title, trigger=trigger, actions=[action])


def _crash_the_silent(seconds: int) -> AutomationCore:
    """As in Prefect's guide to zombie flows (docs.prefect.io/v3/advanced/detect-zombie-flows)."""
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name=PREFIX + "a run fell silent",
        trigger=EventTrigger(
            after={heartbeat},
            # Any word of the run will do: the events of its end have the names of states, Skipped and Kept among them.
            expect={"prefect.flow-run.*"},
            match=RUNS,
            match_related=_flows((*MOVING, *WATCHING)),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"No sign of life for {seconds} s.")],
    )


def apply(settings: Settings) -> list[str]:
    """Make the server's automations of ours these, no more and no fewer; returns their names.

    Raises SettingsError when one of the addresses is none that Apprise knows.
    """
    block = None
    if settings.notify is not None:
        _require_known(settings.notify.get_secret_value())
        address = NotificationAddress(url=settings.notify)
        block = UUID(str(address.save(BLOCK, overwrite=True)))
    wanted = {automation.name: automation for automation in automations(settings, block)}
    with get_client(sync_client=True) as client:
        found = {known.name: known for known in client.read_automations() if known.name.startswith(PREFIX)}
        for name in found.keys() - wanted.keys():
            client.delete_automation(found[name].id)
    for name, automation in wanted.items():
        if (known := found.get(name)) is not None:
            paused = automation.model_copy(update={"enabled": known.enabled})
            Automation(id=known.id, **paused.model_dump()).update()
        else:
            Automation(**automation.model_dump()).create()
    return list(wanted)


def _require_known(addresses: str) -> None:
    for number, address in enumerate(addresses.split(), start=1):
        with _silent("apprise"):
            known = Apprise.instantiate(address)
        if known is None:
            # The rest of it is often a secret.
            kind = address.partition("://")[0] if "://" in address else "no scheme"
            raise SettingsError(
                "SHIP_NOTIFY: expected addresses for Apprise, separated by spaces (slack://…, mailtos://…), got "
                f"{kind} as number {number}, which it cannot read; see https://appriseit.com"
            )


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Apprise writes an address that it does not know into its log, with the password."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def main() -> int:
    """Write the automations of the settings' server; returns the exit status."""
    try:
        settings = Settings.load()
        os.environ.update(settings.prefect_variables)
        print(", ".join(apply(settings)))
    except ShipError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
