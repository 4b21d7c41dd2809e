"""Reports say what the verdict says: a table for a terminal, a page that needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest

from loadgen.judge import judge
from loadgen.report import text
from loadgen.report_html import DOTS_MAX, USERS_MAX, page
from tests.loadgen.fixture import BUDGETS, RUN, TWENTY

VOID = {"meta", "br"}


class Shape(HTMLParser):
    """Which elements a page has, and whether each is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shape(html: str) -> Shape:
    parser = Shape()
    parser.feed(html)
    parser.close()
    return parser


def html() -> str:
    return page(judge(RUN, TWENTY, BUDGETS), TWENTY, BUDGETS)


def test_the_terminal_report_begins_with_the_verdict() -> None:
    lines = text(judge(RUN, TWENTY, BUDGETS)).splitlines()
    assert lines[0] == "met 10 of 20 offered requests (50.0%): 0.10 requests/s and 1.0 tokens/s of goodput"
    assert re.match(r"  FAIL +chatbot\+ +41.7% of 99% wanted", lines[1])
    assert lines[4] == "  INVALID: 1 of 12 chatbot+ requests were refused; over 1 % no run counts"


def test_too_few_sessions_to_say_are_not_called_a_failure() -> None:
    good = [msgspec.structs.replace(TWENTY[0], row=n, session=f"s{n}") for n in range(100, 124)]
    verdict = judge(RUN, [*good, TWENTY[2]], BUDGETS)
    assert text(verdict).splitlines()[1].startswith("  too few to say  chatbot+")
    assert not verdict.is_pass
    written = page(verdict, [*good, TWENTY[2]], BUDGETS)
    assert '<span class="badge unsure">too few to say</span>' in written
    assert "too few to say: 24 of 25 met" in written
    assert '<span class="badge fail">fail</span>' in page(judge(RUN, [TWENTY[2]], BUDGETS), [TWENTY[2]], BUDGETS)


def test_the_table_has_a_row_a_class_and_below_it_a_row_a_worker() -> None:
    rows = [line.split() for line in text(judge(RUN, TWENTY, BUDGETS)).splitlines()]
    #                    offered met refused lost left
    assert ["chatbot+", "12", "5", "1", "3", "1"] in [row[:6] for row in rows]
    assert ["worker", "w0", "5", "4", "1", "0", "0"] in [row[:7] for row in rows]
    assert ["not", "named", "2", "0", "0", "2", "0"] in [row[:7] for row in rows]
    chat = next(row for row in rows if row[:2] == ["chatbot+", "12"])
    # TTFT p50 p90 p99 in ms; then three of TPOT; met, line and smooth of 12; ideal and real hit of 3,500 tokens
    assert chat[6:9] == ["600", "1200", "1200"]
    assert chat[12:] == ["41.7", "41.7", "50.0", "80.0", "43.9"]


@pytest.mark.parametrize("width", [60, 80, 100, 132])
def test_a_narrow_terminal_gets_the_same_report_in_more_lines(width: int) -> None:
    verdict = judge(RUN, TWENTY, BUDGETS)
    wide, narrow = text(verdict), text(verdict, width)
    assert max(map(len, narrow.splitlines())) <= width
    assert set(wide.split()) == set(narrow.split())
    assert max(map(len, wide.splitlines())) > 132
    assert narrow.count("offered  met") == 1  # each column once
    assert narrow.count("TPOT p50") == 1


def test_the_report_says_what_the_misses_broke() -> None:
    said = text(judge(RUN, TWENTY, BUDGETS)).splitlines()
    late = "abandoned 1, failed 1, first token late 1, left 1, pace too slow 1, refused 1, unfinished 1"
    assert f"chatbot+ missed 7: {late}" in said
    assert "background-agent missed 2: end too late 2" in said
    assert "chatbot+ missed 7" in html()
    slow = msgspec.structs.replace(TWENTY[2], token_s=[1.2, 9.0], end_s=9.0, completion_tokens=2)
    assert "chatbot+ missed 1: first token late and pace too slow 1" in text(judge(RUN, [slow], BUDGETS))


def test_the_report_names_the_worst_user_and_what_to_repeat_the_run_with() -> None:
    said = text(judge(RUN, TWENTY, BUDGETS))
    assert "worst user of 3: u2, 2 of 5 chat requests met" in said
    assert "trace twenty.jsonl (0123456789ab)" in said
    assert "seed 1, speed 1, stripped 20%" in said
    assert "tokens wasted on misses 56" in said


def test_users_are_shown_up_to_a_bound_and_none_is_called_the_worst_where_all_was_met() -> None:
    good = [msgspec.structs.replace(TWENTY[0], user=f"u{n // 5}") for n in range(5 * (USERS_MAX + 3))]
    verdict = judge(RUN, good, BUDGETS)
    drawn = page(verdict, good, BUDGETS)
    assert len(re.findall(r"<tr><td>u\d+</td>", drawn)) == USERS_MAX
    assert "3 more users" in drawn
    assert "Every user with 5 requests or more had all of them met" in drawn
    assert "worst user" not in text(verdict)
    assert f"every user of {USERS_MAX + 3} with 5 chat requests or more had all met" in text(verdict)


def test_a_worker_is_green_only_where_the_class_got_what_is_wanted() -> None:
    def colour(met: int, missed: int) -> str:
        on_one = [msgspec.structs.replace(one, worker="w0") for one in (TWENTY[0], TWENTY[2])]
        asked = [on_one[0]] * met + [on_one[1]] * missed
        (found,) = re.findall(r"var\(--met\) (\d+)%,var\(--missed\)", page(judge(RUN, asked, BUDGETS), asked, BUDGETS))
        return found

    assert [colour(99, 1), colour(89, 11), colour(79, 21), colour(0, 9)] == ["100", "25", "0", "0"]


def test_a_run_of_nothing_is_reported_without_an_error() -> None:
    verdict = judge(RUN, [], BUDGETS)
    assert text(verdict).startswith("met 0 of 0")
    assert "</html>" in page(verdict, [], BUDGETS)


def test_the_page_is_well_formed_and_needs_nothing_but_itself() -> None:
    found = shape(html())
    assert found.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.seen}
    assert not [value for _, attrs in found.seen for name, value in attrs.items() if name in ("src", "href")]
    assert "url(" not in html()
    assert "@import" not in html()


def test_every_picture_is_well_formed_and_named_and_has_no_number_that_is_none() -> None:
    pictures = re.findall(r"<svg.*?</svg>", html(), re.DOTALL)
    assert len(pictures) >= 6  # three gauges, first tokens, seconds, slowest seconds
    for picture in pictures:
        assert ElementTree.fromstring(picture).get("aria-label")
        assert not re.search(r"\b(nan|inf)\b", picture)


def test_each_timed_chat_request_is_one_mark_and_the_silent_ones_are_counted() -> None:
    found = html().partition("<h2>Second by second")[0]
    timed = [record for record in TWENTY[:12] if record.token_s]
    assert len(re.findall(r'<circle class="met"', found)) == 5
    assert len(re.findall(r'class="(?:missed|lost) cross"', found)) == len(timed) - 5
    assert "3 that never had a first token are not drawn" in found


def test_the_page_carries_the_verdict_the_worst_user_and_the_classifiers_table() -> None:
    words = " ".join(shape(html()).words)
    assert "10 of 20 offered requests met their own target" in words
    assert "1 of 12 chatbot+ requests were refused" in words
    assert "Classifier" in words
    assert re.search(r"Worst: *u2", words)


def test_names_from_a_trace_or_a_server_are_text_and_nothing_else() -> None:
    bad = "<script>alert(1)</script>"
    records = [
        msgspec.structs.replace(one, user=bad, worker=bad, session=bad, assigned_class=bad, class_reason=bad)
        for one in TWENTY
    ]
    run = msgspec.structs.replace(RUN, trace_name=bad, model=bad, machine=bad)
    assert "<script" not in page(judge(run, records, BUDGETS), records, BUDGETS)


def test_the_page_has_colours_for_light_and_dark() -> None:
    defaults, dark = (re.findall(r"--[a-z]+(?=:)", part) for part in html().split("prefers-color-scheme:dark")[:2])
    assert set(dark) == set(defaults)


def test_the_same_records_give_the_same_page() -> None:
    assert html() == html()


def test_a_picture_of_very_many_requests_keeps_misses_and_says_what_it_leaves_out() -> None:
    record = TWENTY[0]
    many = [record] * (3 * DOTS_MAX) + [TWENTY[2]] * 10
    drawn = page(judge(RUN, many, BUDGETS), many, BUDGETS)
    drawn = drawn.partition("<h2>Second by second")[0]  # the picture by new tokens; the worst user's comes later
    assert drawn.count('class="missed cross"') == 10
    assert drawn.count('<circle class="met"') <= DOTS_MAX
    assert "are left out of the picture" in drawn


def test_requests_are_counted_in_whole_ones() -> None:
    """One request a second at most: an axis in halves would count halves of requests."""
    one = msgspec.structs.replace(TWENTY[0], intended_s=0.0)
    drawn = page(judge(RUN, [one], BUDGETS), [one], BUDGETS)
    seconds = drawn.partition("<h2>Second by second")[2].partition("</svg>")[0]
    assert re.findall(r'text-anchor="end">([0-9.]+)<', seconds) == ["0", "1"]
