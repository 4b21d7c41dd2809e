"""The edge between fleets that suffice and those that do not is found in few looks, and said as it was found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loadgen.fleets import REPLICAS_MAX, SIZES_MAX, Checked, edge, search, text
from loadgen.search import Share


def asked(suffices: Callable[[int], bool], planned: int, high: float = 0.98) -> list[Checked]:
    return search(lambda size: Checked(size, suffices(size), {"chatbot+": Share(1 - 1 / size, 0, high, 0.99)}), planned)


@pytest.mark.parametrize("planned", [1, 2, 8, 60, 256])
@pytest.mark.parametrize("truth", [1, 2, 5, 7, 8, 9, 61, 200])
def test_the_smallest_sufficient_fleet_is_found_wherever_the_plan_was(planned: int, truth: int) -> None:
    found = asked(lambda size: size >= truth, planned)
    assert edge(found) == (truth - 1, truth)
    assert len(found) <= SIZES_MAX
    assert {planned, planned + 1} <= {one.replicas for one in found}


def test_the_answer_names_the_edge_and_how_far_the_closed_form_is_from_it() -> None:
    said = text(asked(lambda size: size >= 4, 8), 8, busy=3.25)
    assert "smallest fleet that suffices: 4 (3 fails); the closed form asks for 4 more" in said
    assert "its work alone for 3.25: it keeps room free" in said
    assert "its work alone for 5.50: so short a trace" in text(asked(lambda n: n >= 4, 8), 8, busy=5.5)
    assert "suffices: 9 (8 fails); the closed form asks for 1 fewer: " in text(asked(lambda n: n >= 9, 8), 8, busy=7.0)
    assert text(asked(lambda size: size >= 8, 8), 8, busy=7.0).endswith(
        "suffices: 8 (7 fails), as the closed form says"
    )
    assert text(asked(lambda _: True, 1), 1, busy=0.1).endswith("suffices: 1, as the closed form says")


def test_a_miss_that_may_be_chance_is_not_called_a_failure() -> None:
    said = text(asked(lambda size: size >= 4, 4, high=0.995), 4, busy=3.0)
    assert "too few to say" in said
    assert "FAIL" not in said
    assert "suffices: 4 (3 misses by what may be chance: more --seeds), as the closed form says" in said


def falling_short(short: Callable[[int], float]) -> Callable[[int], Checked]:
    return lambda size: Checked(size, False, {"chatbot+": Share(0.99 - short(size), 0, 1, 0.99)})


def test_a_workload_that_no_fleet_holds_ends_the_search() -> None:
    found = search(falling_short(lambda size: 0.5 / size), 3)
    assert [one.replicas for one in found] == [2, 3, 4, 8, 16, 32, 64, 128, REPLICAS_MAX]
    assert text(found, 3, busy=2.0).endswith("no fleet that was tried suffices, up to 256 replicas")


def test_no_more_replicas_are_tried_where_twice_as_many_did_not_help() -> None:
    found = search(falling_short(lambda size: 0.5 / min(size, 8)), 3)
    assert [one.replicas for one in found] == [2, 3, 4, 8, 16]
    assert "16 replicas: twice as many did not help, so what misses is not for want of them" in text(found, 3, 2.0)


def test_the_search_ends_after_its_bound_and_says_what_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.fleets.SIZES_MAX", 4)
    found = asked(lambda size: size >= 4, 64)
    assert [one.replicas for one in found] == [31, 63, 64, 65]
    assert "smallest fleet that suffices: 1 to 31; the search ended after 4 sizes" in text(found, 64, busy=3.0)


def test_a_larger_fleet_that_failed_is_not_passed_over_in_silence() -> None:
    found = asked(lambda size: size in (4, 5, 6, 7, 9), 8)
    assert edge(found) == (3, 4)
    assert "suffices: 4 (3 fails); yet 8 failed: too close to call, give it more --seeds" in text(found, 8, busy=3.0)
