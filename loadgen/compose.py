"""Compose: a seeded trace with all three classes, drawn from the marginals that public traces have.

Owns the figures of the mix, with their sources. Never looks at a server: the same seed gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from loadgen.texts import is_text
from loadgen.traces import ClassName, Gap, Header, Row, Trace, families, nominal_starts_s

BLOCK_TOKENS = 256  # before scaling; 1/16 makes it 16, the embedded engine's own block
NOMINAL_TURN_S = 2.0  # what a turn is taken to last when the trace is cut to its duration
FEW = 16  # arrivals of a class, below which they are spread: one every 6 s of the demonstration
USER_SKEW = 1.0  # Zipf exponent: with 12 users the first sends 32 % (ServeGen's largest client: 14 to 52 %)
Z90 = 1.2815515594600038  # standard normal quantile: p90 of a lognormal is median * exp(Z90 * sigma)


@dataclass(frozen=True, slots=True)
class Spread:
    """A lognormal by its median and its 90th percentile, capped at `most`."""

    p50: float
    p90: float
    most: float = math.inf

    def draw(self, rng: np.random.Generator) -> float:
        """One value."""
        sigma = math.log(self.p90 / self.p50) / Z90
        return min(self.most, float(self.p50 * np.exp(sigma * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class Agent:
    """Sessions that grow: each turn's prompt is the last one, its answer, and something new."""

    request_class: ClassName
    sessions_per_s: float
    steps_per_request: float  # tool steps between two human messages, mean of a geometric
    requests_per_session: float  # human messages, mean of a geometric
    preamble_tokens: int = 15_000  # tools and system text, the same for all users (Weka: p50 about 15,000)
    project_tokens: int = 2_000  # the user's own notes, the same in all of their sessions
    append: Spread = Spread(857, 4_800)  # TraceLab p50, Weka p90
    output: Spread = Spread(218, 898, 16_000)  # Weka
    tool_gap_s: Spread = Spread(0.3, 13.6)  # TraceLab
    human_gap_s: Spread = Spread(84, 1_236)  # TraceLab


@dataclass(frozen=True, slots=True)
class Jobs:
    """Bursts of single requests that share a template and ask for little: a script over many items."""

    bursts_per_s: float
    rows: Spread = Spread(16, 40, 100)
    rows_per_s: float = 26.0  # inside a burst (Azure code: its busiest second)
    template_tokens: int = 1_024
    item: Spread = Spread(445, 4_164)  # with the template, Azure code's input: p50 1,469, p90 5,188
    output: Spread = Spread(28, 120, 2_000)  # Azure code's mean, conv's median


@dataclass(frozen=True, slots=True)
class Mix:
    """What `compose` makes; rates are of a small server on two CPU cores and grow with `load`."""

    chat: Agent = Agent("chatbot+", 0.08, steps_per_request=7.8, requests_per_session=9.2)
    background: Agent = Agent("background-agent", 0.015, steps_per_request=33, requests_per_session=1)
    jobs: Jobs = Jobs(0.015)
    users: int = 12
    user_skew: float = USER_SKEW


@dataclass(frozen=True, slots=True)
class _First:
    """Whose session begins, when, and what its prompts begin with."""

    name: str
    user: str
    at_s: float
    known_blocks: list[int]


@dataclass(slots=True)
class _Builder:
    """Draws rows; block ids are handed out once each, so equal ids mean equal text."""

    mix: Mix
    rng: np.random.Generator
    next_id: int = 0

    def blocks(self, count: int) -> list[int]:
        first, self.next_id = self.next_id, self.next_id + count
        return list(range(first, self.next_id))

    def user(self) -> str:
        return skewed_user(self.rng, self.mix.users, self.mix.user_skew)

    def arrivals(self, rate: float, duration_s: float) -> list[float]:
        """A Poisson process over the duration, its first arrival in the first tenth: a short trace has every class.

        One that expects at most FEW arrivals draws one in each of so many equal parts: chance alone left half of a
        trace of 100 s idle."""
        if 0 < rate * duration_s <= FEW:
            parts = max(1, round(rate * duration_s))
            first = float(self.rng.uniform(0, duration_s / max(parts, 10)))
            return [first, *(float(self.rng.uniform(n, n + 1)) * duration_s / parts for n in range(1, parts))]
        at, found = float(self.rng.uniform(0, duration_s / 10)), []
        while rate > 0 and at < duration_s:
            found.append(at)
            at += float(self.rng.exponential(1.0 / rate))
        return found

    def sessions(self, agent: Agent, duration_s: float) -> list[list[Row]]:
        preamble = self.blocks(agent.preamble_tokens // BLOCK_TOKENS)
        projects: dict[str, list[int]] = {}
        made = []
        for number, at in enumerate(self.arrivals(agent.sessions_per_s, duration_s)):
            user = self.user()
            if user not in projects:
                projects[user] = self.blocks(agent.project_tokens // BLOCK_TOKENS)
            name = f"{agent.request_class.removesuffix('+')}-{number:04d}"
            made.append(self.session(agent, _First(name, user, at, preamble + projects[user]), duration_s))
        return made

    def session(self, agent: Agent, first: _First, duration_s: float) -> list[Row]:
        """Turns until the session ends, or would begin past the trace's end."""
        rows: list[Row] = []
        ids, now = list(first.known_blocks), first.at_s
        length = len(ids) * BLOCK_TOKENS
        for gap, delay_s in self.gaps(agent):
            now += delay_s
            if now >= duration_s:
                break
            length += max(1, round(agent.append.draw(self.rng)))
            ids += self.blocks(length // BLOCK_TOKENS - len(ids))
            row = Row(
                timestamp=None if rows else _ms(first.at_s),
                delay=_ms(delay_s) if rows else None,
                session_id=first.name,
                request_class=agent.request_class,
                user=first.user,
                gap=gap,
                input_length=length,
                output_length=max(1, round(agent.output.draw(self.rng))),
                hash_ids=list(ids),
            )
            rows.append(row)
            length += row.output_length
            now += NOMINAL_TURN_S
        return rows

    def gaps(self, agent: Agent) -> Iterator[tuple[Gap, float]]:
        """Before each turn of a session: what the wait is for, and how long it is."""
        for request in range(self.geometric(agent.requests_per_session)):
            yield ("human", agent.human_gap_s.draw(self.rng)) if request else ("none", 0.0)
            for _ in range(self.geometric(agent.steps_per_request)):
                yield "tool", agent.tool_gap_s.draw(self.rng)

    def geometric(self, mean: float) -> int:
        return int(self.rng.geometric(1.0 / mean))

    def bursts(self, jobs: Jobs, duration_s: float) -> list[list[Row]]:
        return [self.burst(jobs, at) for at in self.arrivals(jobs.bursts_per_s, duration_s)]

    def burst(self, jobs: Jobs, at: float) -> list[Row]:
        template, user, rows = self.blocks(jobs.template_tokens // BLOCK_TOKENS), self.user(), []
        for _ in range(max(1, round(jobs.rows.draw(self.rng)))):
            length = len(template) * BLOCK_TOKENS + max(1, round(jobs.item.draw(self.rng)))
            own = self.blocks(length // BLOCK_TOKENS - len(template))
            rows.append(
                Row(
                    timestamp=_ms(at),
                    request_class="data-processor",
                    user=user,
                    input_length=length,
                    output_length=max(1, round(jobs.output.draw(self.rng))),
                    hash_ids=template + own,
                )
            )
            at += float(self.rng.exponential(1.0 / jobs.rows_per_s))
        return rows


def skewed_user(rng: np.random.Generator, count: int, skew: float = USER_SKEW) -> str:
    """One of so many users, of whom the first sends most."""
    weights = 1.0 / np.arange(1, count + 1) ** skew
    return f"user-{1 + int(rng.choice(count, p=weights / weights.sum())):02d}"


def compose(mix: Mix, seed: int, duration_s: float, load: float = 1.0) -> Trace:
    """The mix over `duration_s`, with `load` times the sessions; unscaled."""
    build = _Builder(_loaded(mix, load), np.random.default_rng(seed))
    groups = build.sessions(build.mix.chat, duration_s)
    groups += build.sessions(build.mix.background, duration_s)
    groups += build.bursts(build.mix.jobs, duration_s)
    header = Header(
        block_size=BLOCK_TOKENS,
        source="composed from published marginals of TraceLab, Weka, Azure and ServeGen traces",
        notes={"seed": seed, "duration_s": duration_s, "load": load},
    )
    return ordered(Trace(header, tuple(row for group in groups for row in group)))


def _loaded(mix: Mix, load: float) -> Mix:
    return replace(
        mix,
        chat=replace(mix.chat, sessions_per_s=mix.chat.sessions_per_s * load),
        background=replace(mix.background, sessions_per_s=mix.background.sessions_per_s * load),
        jobs=replace(mix.jobs, bursts_per_s=mix.jobs.bursts_per_s * load),
    )


def ordered(trace: Trace) -> Trace:
    """Rows in the order in which they would start."""
    starts = nominal_starts_s(trace.rows, NOMINAL_TURN_S)
    order = sorted(range(len(starts)), key=lambda index: (starts[index], index))
    return replace(trace, rows=tuple(trace.rows[index] for index in order))


def scale(trace: Trace, divisor: int) -> Trace:
    """Tokens and block size divided alike, so that the number of blocks of a prompt, and so the hit rate, stays.

    A prompt whose last block is named rounds up, one with an unnamed tail down: both keep their block count."""
    if divisor == 1:
        return trace
    if any(map(is_text, trace.rows)):
        raise ValueError("rows with text cannot be scaled: a text is as long as it is")
    block, rest = divmod(trace.header.block_size, divisor)
    if rest or not block:
        raise ValueError(f"a block of {trace.header.block_size} tokens cannot be cut into {divisor} equal parts")
    rows = tuple(_scaled(row, divisor, trace.header.block_size) for row in trace.rows)
    header = msgspec.structs.replace(trace.header.noting(scale_divisor=divisor), block_size=block)
    return replace(trace, header=header, rows=rows)


def _scaled(row: Row, divisor: int, block: int) -> Row:
    is_covered = len(row.hash_ids) * block >= row.input_length
    length = -(-row.input_length // divisor) if is_covered else max(1, row.input_length // divisor)
    ids = row.hash_ids[: -(-length // (block // divisor))]
    output = max(1, round(row.output_length / divisor))
    return msgspec.structs.replace(row, input_length=length, output_length=output, hash_ids=ids)


def drop_over_context(trace: Trace, context: int) -> Trace:
    """Without the sessions whose longest turn exceeds the context: each goes whole, and the header counts them."""
    names = families(trace.rows)
    lengths = (row.input_length + row.output_length for row in trace.rows)
    over = {name for name, length in zip(names, lengths, strict=True) if length > context}
    rows = tuple(row for name, row in zip(names, trace.rows, strict=True) if name not in over)
    if not rows:
        raise ValueError(f"no session fits {context} tokens of context: try a smaller --scale-tokens")
    header = trace.header.noting(context=context, dropped_over_context=len(over))
    return replace(trace, header=header, rows=rows)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
