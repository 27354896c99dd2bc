"""What `ship rollout` takes. Every command imports this, so nothing else is loaded here."""

from __future__ import annotations

from typing import Annotated

import typer


def rollout(
    model: str,
    candidate: Annotated[
        str, typer.Argument(help="The release: an id or its beginning, staging, v7. Without it, shows the rollout.")
    ] = "",
    to: Annotated[str, typer.Option(help="The channel where it is to go live in the end.")] = "prod",
    why: Annotated[str, typer.Option(help="The reason, for the record.")] = "",
    steps: Annotated[str, typer.Option(help="Percentages of the requests, rising to 100: 1,5,25,100.")] = "",
    every: Annotated[str, typer.Option(help="How long each stands at least: 90s, 10m, 2h.")] = "",
    key: Annotated[str, typer.Option(help="Name of what requests are split by: user_id.")] = "",
    max_hours: Annotated[float | None, typer.Option(help="After which it ends undecided: 24.")] = None,
    fallback_ms: Annotated[
        int | None, typer.Option(help="Milliseconds after which the live release answers instead; 0 for no limit.")
    ] = None,
    shadow: Annotated[
        bool | None, typer.Option("--shadow/--no-shadow", help="Only ask the release beside the live one.")
    ] = None,
    stop_if: Annotated[
        list[str] | None,
        typer.Option(help="A limit, such as errors=+0.5%, p99_ms=1.3x or by=country; can be repeated."),
    ] = None,
    go_on: Annotated[bool, typer.Option("--next", help="Go to the next step now; after the last it is live.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End it: all requests go to what is live.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also a release that was rolled back before.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="In what it may be of another kind than what is live, as with promote; can be repeated."),
    ] = None,
    load_unsigned: Annotated[
        bool, typer.Option("--load-unsigned", help="Also run code of the release that nobody signed, to try it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give a release a growing share of the requests before it is live; or show, move on or end what is running.

    What is left out of the steps is as the release's own job says it (release.rollout).
    """
    from train_and_ship.ship.rollout import Asked, rollout

    given = {"steps": steps, "every": every, "key": key}
    more = {"max_hours": max_hours, "fallback_ms": fallback_ms, "shadow": shadow, "stop_if": stop_if or None}
    plan = {name: said for name, said in given.items() if said} | {
        name: said for name, said in more.items() if said is not None
    }
    rollout(
        Asked(model=model, channel=to, why=why, again=again, allow=allow or (), load_unsigned=load_unsigned),
        candidate, plan, go_on=go_on, stop=stop, as_json=as_json,
    )  # fmt: skip
