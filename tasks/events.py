"""Events for people: what Prefect's automations send on to whoever wants to be told (see tasks/automations.py)."""

from __future__ import annotations

from prefect.events import emit_event

from train_and_ship.infra.prefect_events import event_of


def emit(event: str, model: str, subject: str, body: str) -> None:
    """Emit an event about a model. Sent in the background; a server that does not answer is not waited for.

    Args:
        event: one of the names in infra/prefect_events.py.
        model: whom it is about.
        subject: one line, which people see first.
        body: more of it, as plain text.
    """
    emit_event(**event_of(event, model, subject, body))
