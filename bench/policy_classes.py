"""The classifier alone: a trace's requests in the order of their starts, classed by facts and session bits.

Owns the clock of that replay and the counts. No worker is simulated: hours of requests take seconds, and who is
classed does not depend on who was served."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadgen import compose
from loadgen.sim.guise import Guises
from loadgen.traces import CLASSES, Trace, nominal_starts_s
from policies.api import Classified, SessionView
from policies.classify import classify
from policies.limits import Limits
from policies.request import Request, RequestClass, RequestId
from policies.sessions import Sessions

FROM_TURN = 2  # judged from the third request of a session on; single requests that share a beginning are one, too
TURN_S = 2.0  # what an answer takes here
HOURS_S = 7200.0  # two hours: people come back after 84 s in the median, after 20 min in the 90th percentile
SEED = 11  # and the next ones; the rows' constants were chosen on seeds 1 to 4
STRIPPED = {"headers": 0.0, "half stripped": 0.5, "all stripped": 1.0}

Classify = Callable[[Request, SessionView, float], Classified]


def always_chat(request: Request, session: SessionView, now: float) -> Classified:
    """The baseline that costs no chat anything."""
    del request, session, now
    return Classified(RequestClass.CHATBOT, "always", RequestClass.CHATBOT)


def headers_only(request: Request, session: SessionView, now: float) -> Classified:
    """Headway's rows without anything remembered."""
    del session
    return classify(request, SessionView(), now)


METHODS: dict[str, Classify] = {"headway": classify, "headers only": headers_only, "always chatbot+": always_chat}


@dataclass(slots=True)
class Confusion:
    """How many requests of each true class were taken for which."""

    counts: dict[str, dict[str, int]] = field(
        default_factory=lambda: {name: dict.fromkeys(CLASSES, 0) for name in CLASSES}
    )

    def share(self, true: str, taken_for: str) -> float | None:
        """Of the requests that are `true`; None if there are none."""
        total = sum(self.counts[true].values())
        return self.counts[true][taken_for] / total if total else None


def confusion(trace: Trace, method: Classify, stripped: float, seed: int) -> Confusion:
    """Everybody answered after TURN_S, and the next turn its gap later."""
    guises, limits = Guises(trace, "m", seed, stripped, is_oracle=False), Limits()
    sessions = Sessions(limits.sessions_max, limits.templates_max)
    found, turns, answers = Confusion(), dict[str, int](), deque[tuple[float, Request]]()
    starts = nominal_starts_s(trace.rows, TURN_S)
    for index in sorted(range(len(starts)), key=lambda index: (starts[index], index)):
        row, now = trace.rows[index], starts[index]
        while answers and answers[0][0] <= now:
            ended, asked = answers.popleft()
            sessions.answered(asked, ended)
        name = row.session_id or f"{row.user}/{row.hash_ids[:1]}"
        turn = turns[name] = turns.get(name, -1) + 1
        request = guises.request(RequestId(str(index)), index, turn, now)
        classified = method(request, sessions.view(request, now), now)
        sessions.note(request, classified, now)
        answers.append((now + TURN_S, request))
        if turn >= FROM_TURN:
            found.counts[row.request_class][classified.request_class.label] += 1
    return found


def table(seeds: int) -> tuple[str, list[list[str]]]:
    """What each method makes of the mix, by how many clients lost their headers."""
    traces = [compose.compose(compose.Mix(users=24), SEED + number, HOURS_S) for number in range(seeds)]
    rows = [["clients", "classifier", *(f"{name} right %" for name in CLASSES), "chatbot+ requests"]]
    for clients, stripped in STRIPPED.items():
        for name, method in METHODS.items():
            found = _sum([confusion(trace, method, stripped, SEED + at) for at, trace in enumerate(traces)])
            right = [f"{100 * (found.share(cls, cls) or 0.0):.1f}" for cls in CLASSES]
            rows.append([clients, name, *right, str(sum(found.counts["chatbot+"].values()))])
    return f"Classifier, from the third request of a session on: mix over {HOURS_S / 3600:.0f} h, {seeds} seeds", rows


def _sum(parts: Sequence[Confusion]) -> Confusion:
    whole = Confusion()
    for part in parts:
        for true, counts in part.counts.items():
            for taken_for, count in counts.items():
                whole.counts[true][taken_for] += count
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="mixes (2)")
    title, rows = table(parser.parse_args().seeds)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(title)
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
