"""Which validation samples gates look at."""

from __future__ import annotations

from collections import Counter

from torchworker.data.drawing import drawn_places


def test_all_are_taken_where_they_fit() -> None:
    assert drawn_places(100, 100, seed=0) is None
    assert drawn_places(100, None, seed=0) is None


def test_of_classes_in_order_each_is_drawn_in_proportion_and_the_seed_says_which() -> None:
    labels = [0] * 6000 + [1] * 3000 + [2] * 1000
    places = drawn_places(10_000, 1000, 0, labels)
    assert places is not None and places == sorted(set(places))
    assert Counter(labels[place] for place in places) == {0: 600, 1: 300, 2: 100}
    assert places == drawn_places(10_000, 1000, 0, labels) != drawn_places(10_000, 1000, 1, labels)


def test_shares_that_are_no_whole_numbers_add_up_to_what_is_drawn() -> None:
    labels = [0] * 5 + [1] * 5 + [2] * 5 + [3]
    places = drawn_places(16, 7, 0, labels)
    assert places is not None and len(places) == 7
    assert max(Counter(labels[place] for place in places).values()) <= 3


def test_without_labels_the_draw_is_from_all_over() -> None:
    places = drawn_places(20_000, 1000, seed=3)
    assert places is not None and len(set(places)) == 1000
    assert 400 < sum(place < 10_000 for place in places) < 600
