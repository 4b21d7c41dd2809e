"""The report for a terminal: verdict, class by worker, users, classifier, honesty.

Owns the words. Every number in it is the verdict's; nothing is computed here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from loadgen.judge import NO_WORKER, PASS_SHARE, Cell, ClassVerdict, Verdict
from loadgen.ranks import Quantiles
from loadgen.traces import CLASSES, ClassName

HEADS = (
    *("", "offered", "met", "refused", "lost", "left"),
    *("TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99"),
    *("met %", "line %", "smooth %", "cached: ideal", "real %"),
)

GROUPS = (5, 3, 3, 3, 2)  # of HEADS: counts, TTFT, TPOT, shares, cached


def text(verdict: Verdict, width: int | None = None) -> str:
    """The whole report, for a terminal of so many columns where one is given."""
    parts = [headline(verdict), misses(verdict), _legend(), table(verdict, width), _agents(verdict)]
    parts += [_incidents(verdict), _users(verdict), _classifier(verdict), honesty(verdict)]
    return "\n\n".join(_wrapped(part, width) for part in parts if part)


def _wrapped(part: str, width: int | None) -> str:
    """Broken between words; what goes on is indented behind its line."""
    if width is None:
        return part
    found = []
    for line in part.splitlines():
        behind = " " * (len(line) - len(line.lstrip()) + 4)
        words = textwrap.TextWrapper(width, subsequent_indent=behind, break_on_hyphens=False, break_long_words=False)
        found += [line] if len(line) <= width else words.wrap(line)
    return "\n".join(found)


def headline(verdict: Verdict) -> str:
    """Goodput, pass or fail by class, validity: what to read if only one thing is read."""
    met = verdict.met / verdict.offered if verdict.offered else 0.0
    lines = [
        f"met {verdict.met} of {verdict.offered} offered requests ({met:.1%}): "
        f"{verdict.goodput_per_s:.2f} requests/s and {verdict.good_tokens_per_s:.1f} tokens/s of goodput"
    ]
    marks = {name: mark_of(name, found) for name, found in verdict.classes.items()}
    width = max(len(mark) for mark in ("pass", *marks.values()))
    for name, found in verdict.classes.items():
        span = f"95 % interval by session {found.attainment_low:.1%} to {found.attainment_high:.1%}"
        lines.append(
            f"  {marks[name]:{width}}  {name:16} {found.cell.attainment:6.1%} of {PASS_SHARE[name]:.0%} wanted   {span}"
        )
    lines += [f"  INVALID: {reason}" for reason in verdict.invalid]
    return "\n".join(lines)


def misses(verdict: Verdict) -> str:
    """What the misses broke, by class."""
    lines = []
    for name, found in verdict.breakdown.misses.items():
        why = ", ".join(f"{reason} {count}" for reason, count in found.items())
        lines.append(f"{name} missed {sum(found.values())}: {why}")
    return "\n".join(lines)


def mark_of(name: ClassName, found: ClassVerdict) -> str:
    """A class's verdict. One late answer of 25 is no proof against 99 %: nor is it a pass."""
    if found.is_pass:
        return "pass"
    return "too few to say" if found.is_unsure(PASS_SHARE[name]) else "FAIL"


def worker_name(worker: str) -> str:
    """A row's or a column's head."""
    return "not named" if worker == NO_WORKER else f"worker {worker}"


def _legend() -> str:
    return (
        "times in ms from the intended moment, by true class; every refused, failed, left, abandoned or unfinished "
        "request is a miss\n"
        "met: chatbot+ by TTFT and mean TPOT, others by their end | line: every token by its due time | "
        "smooth: no pause over 200 ms | lost: failed, abandoned or unfinished | not named: the answer named no worker"
    )


def table(verdict: Verdict, width: int | None = None) -> str:
    """A row a class, and below it a row a worker; in several parts where it is too wide for one."""
    rows = [list(HEADS)]
    for name in CLASSES:
        if name in verdict.classes:
            rows.append([name, *columns(verdict.classes[name].cell)])
            workers = verdict.workers[name]
            rows += [[f"  {worker_name(worker)}", *columns(cell)] for worker, cell in workers.items()]
    return "\n\n".join(aligned(part) for part in _parts(rows, width))


def _parts(rows: Sequence[Sequence[str]], width: int | None) -> list[list[list[str]]]:
    """As many groups of columns side by side as there is room for, each part behind the names."""
    parts, start = [[list(row[:1]) for row in rows]], 1
    for size in GROUPS:
        group = [list(row[start : start + size]) for row in rows]
        wider = [[*row, *more] for row, more in zip(parts[-1], group, strict=True)]
        if width is not None and max(map(len, aligned(wider).splitlines())) > width and len(parts[-1][0]) > 1:
            wider = [[row[0], *more] for row, more in zip(rows, group, strict=True)]
            parts.append(wider)
        parts[-1] = wider
        start += size
    return parts


def columns(cell: Cell) -> list[str]:
    """A cell under HEADS, behind its name."""
    outcomes = cell.outcomes
    lost = outcomes["failed"] + outcomes["abandoned"] + outcomes["unfinished"]
    counts = [str(value) for value in (cell.offered, cell.met, outcomes["refused"], lost, outcomes["left"])]
    times = [*_times(cell.ttft_s), *_times(cell.tpot_s)]
    shares = [_share(value, cell.offered) for value in (cell.met, cell.on_line, cell.smooth)]
    cached = [_share(value, cell.input_tokens) for value in (cell.cached_ideal, cell.cached_real)]
    return [*counts, *times, *shares, *cached]


def _times(found: Quantiles) -> list[str]:
    return ["-" if value is None else f"{value * 1e3:.0f}" for value in (found.p50, found.p90, found.p99)]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _agents(verdict: Verdict) -> str:
    """The classes that are judged by their end."""
    lines = []
    for name, found in verdict.classes.items():
        end = found.cell.e2e_s
        if name != "chatbot+" and end.p50 is not None and end.p90 is not None and end.p99 is not None:
            lines.append(f"{name} to the end: p50 {end.p50:.2f} s, p90 {end.p90:.2f} s, p99 {end.p99:.2f} s")
    return "\n".join(lines)


def _incidents(verdict: Verdict) -> str:
    """What the router told of its workers, or a script did to simulated ones."""
    return "\n".join(f"at {one.at_s:.0f} s: {one.text}" for one in verdict.run.incidents)


def _users(verdict: Verdict) -> str:
    worst = verdict.worst_user
    if worst is None or verdict.users_p5 is None:
        return ""
    if worst.met == worst.offered:
        return f"every user of {len(verdict.users)} with {verdict.fair_offered_min} chat requests or more had all met"
    jain = "" if verdict.jain is None else f", Jain index {verdict.jain:.3f}"
    return (
        f"worst user of {len(verdict.users)}: {worst.name}, {worst.met} of {worst.offered} chat requests met; "
        f"of users with {verdict.fair_offered_min} or more: p5 {verdict.users_p5:.1%}{jain}"
    )


def _classifier(verdict: Verdict) -> str:
    """Truth in rows, what the server assigned in columns."""
    seen = sorted({name for row in verdict.confusion.values() for name in row}, key=_class_order)
    if not seen or seen == ["unknown"]:
        return ""
    rows = [["true class, assigned:", *seen]]
    rows += [[name, *(str(row.get(to, 0)) for to in seen)] for name, row in verdict.confusion.items()]
    reasons = ", ".join(f"{name} {count}" for name, count in verdict.class_reasons.items())
    return aligned(rows) + (f"\nby reason: {reasons}" if reasons else "")


def _class_order(name: str) -> int:
    return list(CLASSES).index(name) if name in CLASSES else len(CLASSES)


def honesty(verdict: Verdict) -> str:
    """Enough to repeat the run, and to doubt it."""
    run = verdict.run
    bound = "" if verdict.lag_bound_ms is None else f" (bound {verdict.lag_bound_ms:.0f})"
    lag = "/".join("-" if value is None else f"{value:.1f}" for value in _three(verdict.lag_ms))
    crew = f" in {run.clients} processes" if run.clients > 1 else ""
    warm = f" (the first {run.warmup_s:g} s, {verdict.warmup_requests} requests, not judged)" if run.warmup_s else ""
    notes = ", ".join(f"{name} {value}" for name, value in run.trace_notes.items()) or "no notes"
    return "\n".join(
        [
            f"trace {run.trace_name} ({run.trace_digest}), bad rows {run.trace_bad_rows}; {notes}",
            f"{run.dialect}, seed {run.seed}, speed {run.speed:g}, stripped {run.stripped_share:.0%}, offered for "
            f"{run.duration_s:g} s{warm}, took {run.wall_s:.0f} s, later turns not reached {run.not_reached}",
            f"client lag p50/p90/p99 {lag} ms{bound}, client CPU {run.client_cpu_s:.1f} s{crew}; "
            f"lengths other than asked: prompt {verdict.prompt_mismatches}{_meant(verdict.breakdown.prompt_realised)}, "
            f"output {verdict.output_mismatches}{_meant(verdict.breakdown.output_realised)}; "
            f"tokens wasted on misses {verdict.wasted_tokens}",
            f"budgets from {run.budgets_from}; {run.model} at {run.target}; {run.machine}; headway {run.version}; "
            f"{run.started}",
        ]
    )


def _meant(realised: float | None) -> str:
    """Tokens that the server counted to those that were meant, where they differ."""
    return "" if realised is None or abs(realised - 1) < 5e-4 else f" ({realised:.3f} times the tokens)"


def _three(found: Quantiles) -> tuple[float | None, float | None, float | None]:
    return found.p50, found.p90, found.p99


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *rest]).rstrip()


def simulated(verdicts: Mapping[str, Verdict]) -> str:
    """Policies side by side: attainment by class, and what the cache and the worst user had of it."""
    rows = [
        ["policy", *(f"{name} met %" for name in CLASSES), "line %", "refused", "worst user %", "cached %", "good/s"]
    ]
    for policy, found in verdicts.items():
        cells = [found.classes[name].cell if name in found.classes else None for name in CLASSES]
        chat = cells[0]
        asked = sum(cell.input_tokens for cell in cells if cell)
        hits = sum(cell.cached_real for cell in cells if cell)
        worst = found.worst_user
        rows.append(
            [
                policy,
                *(_percent(cell.attainment) if cell else "-" for cell in cells),
                _percent(chat.on_line / chat.offered) if chat else "-",
                str(sum(cell.outcomes["refused"] for cell in cells if cell)),
                _percent(worst.met / worst.offered) if worst else "-",
                _percent(hits / asked) if asked else "-",
                f"{found.goodput_per_s:.2f}",
            ]
        )
    return aligned(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
