"""The schedule of the flow `watch`, which looks at rollouts each minute: switched on where there is one."""

from __future__ import annotations

from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.settings import Settings

DEPLOYMENT = "watch/watch"
_NONE = f"Prefect has no deployment {DEPLOYMENT}; `ship up` or `prefect deploy --all` makes it"


def watch_rollouts(settings: Settings, wanted: bool = True) -> str:
    """Switch the schedule on, or off where nothing is left to watch. Writes to Prefect; can be repeated.

    A run a minute that has nothing to look at would cost more than it is worth.

    Returns:
        Why nobody watches, in words; empty where that is as it is wanted.
    """
    try:
        reply = prefect_api(settings, "GET", f"/deployments/name/{DEPLOYMENT}")
        if not reply.is_success:
            return f"nobody watches this rollout: {_NONE}"
        deployment = reply.json()
        for schedule in deployment["schedules"]:
            if schedule["active"] is not wanted:
                place = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
                if not (done := prefect_api(settings, "PATCH", place, {"active": wanted})).is_success:
                    return f"nobody watches this rollout: the schedule of {DEPLOYMENT}: {done.status_code} {done.text}"
    except ShipError as error:
        return f"nobody watches this rollout: {error}"
    if wanted and (deployment["paused"] or not deployment["schedules"]):
        return f"nobody watches this rollout: {DEPLOYMENT} is paused, or has no schedule"
    return ""
