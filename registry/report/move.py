"""The report of a release that was in the bucket already and moves: who asks for it, why, and what changes by it.

No store, no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from train_and_ship.registry.channels.targets import Scored, Verified
from train_and_ship.registry.diff import KIND, Difference
from train_and_ship.registry.report.page import Page, Section, Text
from train_and_ship.registry.report.run import Outcome, decision_section, outcome_page
from train_and_ship.registry.text import Cell, Table, number

NOTICED = (KIND, "metrics", "parity", "latency", "size", "signature")
"""Groups of differences that whoever calls the model notices; the others tell where they come from."""


def move_page(
    outcome: Outcome, verified: Verified, checked: Mapping[str, str], changes: Sequence[Difference], problem: str
) -> Page:
    """The report.

    Args:
        outcome: Who asked for the move, and what came of it.
        verified: The release that moves.
        checked: Gate to what was found, in words.
        changes: From what was live to the target.
        problem: Why nobody can tell them; empty otherwise.
    """
    target = verified.target
    sections = [decision_section(outcome), _checked(checked), _scored(verified.scored)]
    title = "What changes"
    if target.live is None:
        sections.append(Section(title=title, blocks=[Text(text="Nothing was live before.")]))
    elif problem:
        sections.append(Section(title=title, blocks=[Text(text=f"Nobody can tell: {problem}")]))
    else:
        sections.append(_changes(f"{title}, from release {target.live.release}", changes))
    return outcome_page(outcome, sections)


def noticed(changes: Sequence[Difference]) -> Table:
    """What whoever calls the model notices."""
    return _table([one for one in changes if one.group in NOTICED and not one.noise])


def _changes(title: str, changes: Sequence[Difference]) -> Section:
    first, rest = noticed(changes), _table([one for one in changes if one.group not in NOTICED])
    if not changes:
        return Section(title=title, blocks=[Text(text="No difference.")])
    blocks = [first] if first.rows else [Text(text="Nothing that a caller would notice.")]
    more = [rest] if rest.rows else []
    return Section(title=title, blocks=blocks, more=more, more_title="Code, data, training, packages, job")


def _table(differences: Sequence[Difference]) -> Table:
    rows = [(one.group, one.name, one.before, one.after, one.change) for one in differences]
    return Table(header=("what", "name", "before", "after", "change"), rows=rows)


def _checked(checked: Mapping[str, str]) -> Section:
    rows: list[Sequence[Cell]] = list(checked.items())
    return Section(title="What was checked", blocks=[Table(rows=rows)] if rows else [])


def _scored(scored: Scored | None) -> Section:
    title = "Beside the live release"
    if scored is None or not scored.samples or not scored.live:
        return Section(title=title, blocks=())
    if scored.problem:
        return Section(title=title, blocks=[Text(text=f"It could not be scored: {scored.problem}")])
    rows = [(name, number(value), number(scored.against.get(name))) for name, value in scored.candidate.items()]
    said = f"Both were run by one process on the same {scored.samples:,} held-out samples."
    return Section(title=title, blocks=[Text(text=said), Table(header=("metric", "this release", "live"), rows=rows)])
