"""`ship diff`: what changed between two releases."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import typer

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import models
from train_and_ship.registry.channels.revisions import GRAMMAR, named_release
from train_and_ship.registry.diff import Difference, compare
from train_and_ship.registry.text import Table
from train_and_ship.ship.named import named_channel

LONGEST = 60
"""Characters shown of one value; --json has all of it."""
HASH = 13
"""The same of a file's hash."""
MOST_LINES = 200
"""Of one group; --json has all of them."""


def diff(words: Sequence[str], as_json: bool) -> None:
    """Print the differences. words: `[MODEL] BEFORE AFTER`; the model may be left out where there is one only."""
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    model, before, after = _named(store, words)
    channel = named_channel(settings, model)
    one, two = (named_release(channel, name) for name in (before, after))
    found = compare(store, model, one, two)
    if as_json:
        rows = [dataclasses.asdict(difference) for difference in found]
        typer.echo(
            json.dumps({"model": model, "before": one.release, "after": two.release, "differences": rows}, indent=1)
        )
        return
    typer.echo(f"{model}: {before} = {one.release}, {after} = {two.release}\n")
    shown = [one for one in found if not one.noise]
    typer.echo(_table(shown) if shown else "no difference" if not found else "no difference but noise")
    if left := len(found) - len(shown):
        typer.echo(f"\nnot shown: {left} within noise (times of like calls, sizes by less than 0.1%); --json has them")


def _named(store: ObjectStore, words: Sequence[str]) -> tuple[str, str, str]:
    if len(words) == 3:
        return words[0], words[1], words[2]
    known = models(store)
    if len(words) == 2 and len(known) == 1:
        return known[0], words[0], words[1]
    raise RequestError(
        f"expected `ship diff MODEL BEFORE AFTER`, got {' '.join(words)!r}; models: {', '.join(known) or 'none'}. "
        f"A release is {GRAMMAR}"
    )


def _table(found: Sequence[Difference]) -> str:
    rows: list[tuple[str, ...]] = []
    for group, same in itertools.groupby(found, lambda one: one.group):
        ones = list(same)
        longest = HASH if group == "files" else LONGEST
        for one in ones[:MOST_LINES]:
            values = (on_one_line(value, longest) for value in (one.before, one.after))
            rows.append((group, on_one_line(one.name, LONGEST), *values, on_one_line(one.change, LONGEST)))
        if len(ones) > MOST_LINES:
            rows.append((group, f"and {len(ones) - MOST_LINES:,} more", "", "", ""))
    return Table(header=("", "", "before", "after", "change"), rows=rows).text()
