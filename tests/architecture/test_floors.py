"""How many files of `tasks/` one has to read before a stage is understood."""

from __future__ import annotations

from tests.support.import_graph import floors, graph, inside

FLOORS = 5


def test_no_stage_stands_on_more_than_four_floors_of_others() -> None:
    found = floors(inside(graph(), "tasks"))
    assert max(found.values()) <= FLOORS, found
