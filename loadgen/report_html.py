"""The report as one page: verdict, charts, tables, honesty; no script and nothing fetched, light or dark as the reader.

Owns the page's words. Every number in it is the verdict's or a record's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadgen import report_parts
from loadgen.charts import Bar, Dot, Event, gauge, scatter, strip, timeline
from loadgen.judge import NO_WORKER, PASS_SHARE, Cell, Second, Verdict, points
from loadgen.judged import Judged
from loadgen.page import document
from loadgen.records import Record, judged_of
from loadgen.report import HEADS, columns, honesty, mark_of, misses, worker_name
from loadgen.targets import BudgetLine, Budgets, computed_tokens
from loadgen.traces import CLASSES

BADGES = {"unsure": "too few to say"}
HEAT_SPAN = 0.2
USERS_MAX = 40  # in the table: the worst ones; a trace may have thousands
DOTS_MAX = 4000  # in one picture: about 1 MB of page
KEYS = (("met", "met"), ("missed", "answered, too late"), ("refused", "refused"), ("lost", "failed, left or lost"))


def page(verdict: Verdict, records: Sequence[Record], budgets: Budgets) -> str:
    """The whole page."""
    records = judged_of(verdict.run, records)
    sections = [
        _head(verdict),
        _cards(verdict),
        _table(verdict),
        report_parts.refusals(verdict.breakdown),
        _ttft(records, budgets),
        report_parts.bins(verdict.breakdown),
        _time(verdict),
        _heat(verdict),
        _users(verdict),
        report_parts.hits(verdict.breakdown),
        _cost(records, budgets),
        report_parts.sessions(verdict.breakdown),
        _confusion(verdict),
        _honesty(verdict),
    ]
    return document(f"Headway replay: {verdict.run.trace_name}", sections)


def _head(verdict: Verdict) -> str:
    style = _style(verdict)
    run = verdict.run
    reasons = "".join(f"<p><b>Invalid:</b> {escape(reason)}</p>" for reason in verdict.invalid)
    return (
        f'<h1>Replay of {escape(run.trace_name)}<span class="badge {style}">{BADGES.get(style, style)}</span></h1>'
        f"<p>{escape(run.model)} at {escape(run.target)}, {escape(run.started)}; {escape(run.machine)}</p>{reasons}"
    )


def _style(verdict: Verdict) -> str:
    """One class that surely fails is enough to fail."""
    if verdict.invalid or verdict.is_pass:
        return "invalid" if verdict.invalid else "pass"
    missed = [(name, found) for name, found in verdict.classes.items() if not found.is_pass]
    return "unsure" if all(found.is_unsure(PASS_SHARE[name]) for name, found in missed) else "fail"


def _cards(verdict: Verdict) -> str:
    share = verdict.met / verdict.offered if verdict.offered else 0.0
    cards = [
        f'<div class="card"><h3>goodput</h3><b>{verdict.goodput_per_s:.2f}/s</b>'
        f"<span>{verdict.met} of {verdict.offered} offered requests met their own target ({share:.1%}); "
        f"{verdict.good_tokens_per_s:.1f} tokens/s</span></div>"
    ]
    for name, found in verdict.classes.items():
        wanted, cell = PASS_SHARE[name], found.cell
        picture = gauge(cell.attainment, found.attainment_low, found.attainment_high, wanted)
        cards.append(
            f'<div class="card"><h3>{name}</h3><b>{cell.attainment:.1%}</b>'
            f"<span>{mark_of(name, found)}: {cell.met} of {cell.offered} met; {wanted:.0%} wanted; 95 % interval by "
            f"session {found.attainment_low:.0%} to {found.attainment_high:.0%}</span>{picture}</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _table(verdict: Verdict) -> str:
    rows = []
    for name, found in verdict.classes.items():
        rows.append(_row("class", name, found.cell))
        rows += [_row("worker", worker_name(worker), cell) for worker, cell in verdict.workers[name].items()]
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    return (
        "<h2>By class and worker</h2><p>Times in milliseconds from the intended moment. Every refused, failed, left, "
        "abandoned or unfinished request is a miss. Chatbot+ is met by TTFT and mean TPOT, the others by their end; "
        "line: every token by its due time; smooth: no pause over 200 ms. Not named: the answer named no worker.</p>"
        f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>{_misses(verdict)}'
    )


def _misses(verdict: Verdict) -> str:
    said = escape(misses(verdict)).splitlines()
    return f"<p>{'.<br>'.join(said)}.</p>" if said else ""


def _row(style: str, name: str, cell: Cell) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in columns(cell))
    return f'<tr class="{style}"><td>{escape(name)}</td>{cells}</tr>'


def _ttft(records: Sequence[Record], budgets: Budgets) -> str:
    found, left_out = _thinned(points(records, budgets))
    dots = [_dot(new, "new", one) for new, one in found]
    if not dots:
        return ""
    line = _target_line(budgets.get("chatbot+", BudgetLine()), min(dot.x for dot in dots), max(dot.x for dot in dots))
    unseen = sum(record.request_class == "chatbot+" for record in records) - len(dots) - left_out
    silent = f" {left_out} of the dots are left out of the picture." if left_out else ""
    silent += f" {unseen} that never had a first token are not drawn." if unseen else ""
    return (
        "<h2>Chatbot+: first token against new tokens</h2><p>New tokens are the prompt less what an ideal cache holds: "
        "a server's own misses never loosen its target. Dots met it. A cross under the line missed its pace, or its "
        f"end.{silent}</p>"
        f"<figure>{scatter(dots, line, 'new tokens', 'TTFT, seconds')}</figure>"
    )


def _dot(tokens: int, what: str, one: Judged) -> Dot:
    record = one.record
    return Dot(
        tokens,
        one.ttft_s or 0.0,
        "met" if one.is_met else "missed" if record.outcome == "done" else "lost",
        not one.is_met,
        f"{record.user} {record.session} turn {record.turn}: {tokens} {what} tokens, "
        f"TTFT {(one.ttft_s or 0) * 1e3:.0f} ms, worker {record.worker or '?'}",
    )


def _cost(records: Sequence[Record], budgets: Budgets) -> str:
    """The same first tokens against what the server really computed: its misses move a dot to the right."""
    told = [record for record in records if record.cached_tokens is not None]
    found, _ = _thinned(points(told, budgets))
    dots = [_dot(computed_tokens(one.record), "computed", one) for _, one in found]
    if not dots:
        return ""
    return (
        "<h3>Chatbot+: first token against computed tokens</h3><p>What was not in the server's own cache had to be "
        "computed. A dot far to the right of its place in the picture by new tokens is a prefix that was sent to "
        "another worker, or thrown away.</p>"
        f"<figure>{scatter(dots, [], 'computed tokens', 'TTFT, seconds')}</figure>"
    )


def _thinned(found: list[tuple[int, Judged]]) -> tuple[list[tuple[int, Judged]], int]:
    """At most DOTS_MAX: half of them misses while there are so many."""
    if len(found) <= DOTS_MAX:
        return found, 0
    kept = []
    for is_met in (True, False):
        alike = [one for one in found if one[1].is_met == is_met]
        kept += alike[:: max(1, -(-2 * len(alike) // DOTS_MAX))]
    return kept, len(found) - len(kept)


def _target_line(line: BudgetLine, low: float, high: float) -> list[tuple[float, float]]:
    """Twenty points, since a straight line is a curve on logarithmic axes."""
    if line.ttft_s is None:
        return []
    low, high = low / 1.3, high * 1.3
    steps = [low * (high / low) ** (step / 20) for step in range(21)]
    return [(new, line.ttft_s + (line.ttft_s_per_new_token or 0.0) * new) for new in steps]


def _time(verdict: Verdict) -> str:
    bars = [Bar(second.at_s, _parts(second), _title(second)) for second in verdict.seconds]
    dots = [
        Dot(second.at_s + 0.5, second.ttft_max_s, "plain", False, f"{second.at_s} s: {second.ttft_max_s * 1e3:.0f} ms")
        for second in verdict.seconds
        if second.ttft_max_s is not None
    ]
    keys = "".join(f'<span class="key"><i style="background:var(--{name})"></i>{word}</span>' for name, word in KEYS)
    first, end = (bars[0].x, bars[-1].x + 1) if bars else (0.0, 1.0)
    events = [Event(one.at_s, f"at {one.at_s:.0f} s: {one.text}") for one in verdict.run.incidents]
    waited = [
        Bar(second.at_s, (("one", second.waiting_max),), f"second {second.at_s}: {second.waiting_max} at once")
        for second in verdict.seconds
    ]
    queue = timeline(waited, "waiting for a first token, most at once", events=events)
    slow = strip(dots, end, "worst chatbot+ TTFT, seconds", start=first, events=events)
    told = "; ".join(escape(event.title) for event in events)
    said = f"<p><b>What befell workers</b> (dashed lines): {told}.</p>" if told else ""
    warm = f"<p>The first {verdict.run.warmup_s:g} s are not judged and not shown.</p>" if verdict.run.warmup_s else ""
    return (
        f"<h2>Second by second</h2>{warm}{said}<p>{keys}</p>"
        f"<figure>{timeline(bars, 'requests offered', events=events)}</figure><figure>{slow}</figure>"
        f"<figure>{queue}</figure>"
    )


def _parts(second: Second) -> tuple[tuple[str, float], ...]:
    late = second.offered - second.met - second.refused - second.lost
    return ("met", second.met), ("missed", late), ("refused", second.refused), ("lost", second.lost)


def _title(second: Second) -> str:
    return f"second {second.at_s}: " + ", ".join(f"{size:g} {style}" for style, size in _parts(second))


def _heat(verdict: Verdict) -> str:
    named = {worker for cells in verdict.workers.values() for worker in cells}
    workers = sorted(named, key=lambda worker: (worker == NO_WORKER, worker))
    if not workers:
        return ""
    heads = "".join(f"<th>{escape(worker_name(worker))}</th>" for worker in workers)
    rows = [
        f"<tr><td>{name}</td>{''.join(_heat_cell(cells.get(worker), PASS_SHARE[name]) for worker in workers)}</tr>"
        for name, cells in verdict.workers.items()
    ]
    times = verdict.breakdown.imbalance or 1.0
    busy = f" The busiest worker computed {times:.2f} times the tokens of the mean one." if len(workers) > 1 else ""
    return (
        "<h2>Class by worker</h2><p>Attainment: green where as much was met as is wanted of the class, amber from "
        f"{100 * HEAT_SPAN:.0f} points below it; under it TTFT p99, TPOT p99, and tokens cached of those that an ideal "
        f'cache would hold.{busy}</p><div class="scroll"><table class="heat">'
        f"<tr><th></th>{heads}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def _heat_cell(cell: Cell | None, wanted: float) -> str:
    if cell is None:
        return "<td>-</td>"
    times = ", ".join(
        f"{name} {value * 1e3:.0f} ms"
        for name, value in (("TTFT", cell.ttft_s.p99), ("TPOT", cell.tpot_s.p99))
        if value is not None
    )
    held = f"{cell.cached_real / cell.cached_ideal:.0%} of ideal cache" if cell.cached_ideal else "nothing to cache"
    short = min(1.0, max(0.0, wanted - cell.attainment) / HEAT_SPAN)
    green = 100 if not short else 50 * (1 - short)  # a class that misses by little is not green
    mixed = f"color-mix(in srgb,var(--met) {green:.0f}%,var(--missed))"
    return (
        f'<td style="background:color-mix(in srgb,{mixed} 32%,transparent)">'
        f"<b>{cell.attainment:.1%}</b> of {cell.offered}<br><small>{times or 'not streamed'}<br>{held}</small></td>"
    )


def _users(verdict: Verdict) -> str:
    worst = verdict.worst_user
    if worst is None:
        return ""
    least = verdict.fair_offered_min
    fair = "" if verdict.users_p5 is None else f" Of users with {least} requests or more: p5 {verdict.users_p5:.1%}"
    fair += "" if verdict.jain is None else f", Jain index {verdict.jain:.3f}"
    offered = sum(user.offered for user in verdict.users)
    fair += f". Who asks most sends {max(user.offered for user in verdict.users) / offered:.0%} of chat requests."
    rest = len(verdict.users) - USERS_MAX
    more = f"<p>{rest} more users met a larger share: see the JSON.</p>" if rest > 0 else ""
    rows = "".join(
        f"<tr><td>{escape(user.name)}</td><td>{user.met} of {user.offered}</td>"
        f"<td>{user.offered / offered:.1%}</td><td>{user.met / user.offered:.1%}</td>"
        f"<td>{'-' if user.ttft_p99_s is None else f'{user.ttft_p99_s * 1e3:.0f}'}</td>"
        f'<td style="width:280px">{gauge(user.met / user.offered, 1, 1, 0.99)}</td></tr>'
        for user in verdict.users[:USERS_MAX]
    )
    heads = "".join(f"<th>{head}</th>" for head in ("user", "met", "of all requests", "met %", "TTFT p99 ms", ""))
    all_met = f"Every user with {least} requests or more had all of them met."
    said = f"Worst: <b>{escape(worst.name)}</b>, {worst.met} of {worst.offered} chat requests met."
    moments = report_parts.worst_user(verdict.breakdown, worst.name, verdict.run.duration_s)
    return (
        f"<h2>Users</h2><p>{all_met if worst.met == worst.offered else said}{fair}</p>"
        f'<div class="scroll"><table class="users"><tr>{heads}</tr>{rows}</table></div>{more}'
        f"{'' if worst.met == worst.offered else moments}"
    )


def _confusion(verdict: Verdict) -> str:
    seen = [*CLASSES, *sorted({name for row in verdict.confusion.values() for name in row} - set(CLASSES))]
    if not any(name in CLASSES for row in verdict.confusion.values() for name in row):
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in seen)
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(_confusion_cell(name, to, row) for to in seen)}</tr>"
        for name, row in verdict.confusion.items()
    )
    reasons = ", ".join(f"{escape(name)} {count}" for name, count in verdict.class_reasons.items())
    return (
        "<h2>Classifier</h2><p>Rows: the true class, which is never sent. Columns: the class that the server assigned. "
        f"By reason: {reasons}.</p>"
        f'<div class="scroll"><table class="heat"><tr><th></th>{heads}</tr>{rows}</table></div>'
    )


def _confusion_cell(name: str, to: str, row: dict[str, int]) -> str:
    count, total = row.get(to, 0), sum(row.values())
    colour = "var(--met)" if name == to else "var(--missed)"
    share = 100 * count / total if total else 0.0
    shade = f' style="background:color-mix(in srgb,{colour} {0.6 * share:.0f}%,transparent)"' if count else ""
    return f"<td{shade}>{f'<b>{count}</b><br><small>{share:.0f} %</small>' if count else '-'}</td>"


def _honesty(verdict: Verdict) -> str:
    return (
        "<h2>How honest this run was</h2><p>Latencies count from the moment at which a request was meant to be sent. "
        "If the client itself lagged over 5 % of the tightest first-token target at p99, the run is invalid.</p>"
        f'<div class="scroll"><pre>{escape(honesty(verdict))}</pre></div>'
    )
