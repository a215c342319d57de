"""The search finds any capacity to its precision, in few steps, and says so when it finds none."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.eval.load.search import Search


def run(search: Search, capacity: float) -> Search:
    while (load := search.next_load()) is not None:
        search.note(load, load <= capacity)
    return search


@given(st.floats(0.05, 900), st.floats(0.3, 50))
def test_any_capacity_is_bracketed_within_the_precision(capacity: float, start: float) -> None:
    found = run(Search(start), capacity)
    assert found.highest <= capacity < found.refused
    assert found.refused <= 1.12 * found.highest
    assert len(found.tried) <= 24


@given(st.integers(1, 2000))
def test_a_whole_number_is_found_exactly_or_within_the_precision(capacity: int) -> None:
    found = run(Search(1, whole=True), capacity)
    assert found.highest <= capacity < found.refused
    assert found.refused - found.highest == 1 or found.refused <= 1.12 * found.highest
    assert all(load == int(load) for load in found.tried)


def test_no_load_above_the_most_is_tried() -> None:
    found = run(Search(1, most=6), 1000)
    assert found.tried == [1, 2, 4, 6]
    assert (found.highest, found.refused) == (6, math.inf)


@pytest.mark.parametrize("whole", [False, True])
def test_a_server_that_sustains_nothing_ends_the_search(whole: bool) -> None:
    found = run(Search(4, whole=whole), -1)
    assert found.highest == 0
    assert len(found.tried) <= 18


def test_a_server_without_limit_ends_the_search() -> None:
    assert len(run(Search(1), math.inf).tried) <= 18
