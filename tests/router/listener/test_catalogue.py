"""Names of models: what is served, what stands for it, and pages of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.errors import RequestError
from router.listener.catalogue import Catalogue
from tests.router.desk import VIEW

NAMES = ("big", "small", "tiny")


def catalogue(names: tuple[str, ...] = NAMES) -> Catalogue:
    views = {name: replace(VIEW, name=name) for name in names}
    aliases = {"claude-*haiku*": "small", "claude-*": "", "gone": "no-such-model"}
    return Catalogue(lambda: views, "tiny", aliases, 0)


@pytest.mark.parametrize(
    ("asked", "found"),
    [("big", "big"), ("", "tiny"), ("claude-opus-9", "tiny"), ("claude-haiku-9", "small")],
)
def test_a_name_or_an_alias_finds_its_model_and_the_first_that_fits_wins(asked: str, found: str) -> None:
    assert catalogue().find(asked).name == found


@pytest.mark.parametrize("asked", ["gone", "nobody", "Claude-opus"])
def test_an_unknown_name_is_told_what_there_is(asked: str) -> None:
    with pytest.raises(RequestError) as refused:
        catalogue().find(asked)
    assert refused.value.status == 404
    assert all(name in refused.value.detail.message for name in NAMES)


def test_before_a_worker_has_come_the_client_is_told_to_come_back() -> None:
    with pytest.raises(RequestError) as refused:
        catalogue(()).find("tiny")
    assert refused.value.status == 503
    assert refused.value.retry_after_s is not None


def test_a_page_is_as_long_as_its_limit_and_says_where_it_ends() -> None:
    page = catalogue().page({"limit": "2"})
    assert [model["id"] for model in page["data"]] == ["big", "small"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("big", "small", True)
    rest = catalogue().page({"limit": "2", "after_id": "small"})
    assert ([model["id"] for model in rest["data"]], rest["has_more"]) == (["tiny"], False)
    before = catalogue().page({"before_id": "small", "limit": "99999999999999999999"})
    assert [model["id"] for model in before["data"]] == ["big"]
    assert len(catalogue().page({"limit": "nonsense"})["data"]) == len(NAMES)
    assert catalogue(()).page({})["data"] == []
