"""ServeGen: arrival rates of a production service's clients, ten minutes at a time, and lengths where they are there.

Owns their layout, and drawing requests from them by seed. A set without lengths takes them from another trace: none is
made up."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np
import numpy.typing as npt

from loadgen import files
from loadgen.traces import ClassName, Header, Row, Tally, Trace, TraceError

WINDOW_S = 600.0
ROWS_MAX = 2_000_000  # of one drawn trace
INPUTS = ("input_tokens", "text_tokens", "image_tokens")
LICENCE, SOURCE = "Apache-2.0", "alibaba/ServeGen"


@dataclass(frozen=True, slots=True)
class Window:
    """A client's arrivals in ten minutes: so many a second, with gaps of this family and coefficient of variation."""

    start_s: float
    rate_per_s: float
    cv: float
    family: str
    shape: float


Pdf = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


@dataclass(slots=True)
class Client:
    """One client of a set; `lengths` by the second from which they hold: parts of the input, and the output."""

    name: str
    windows: list[Window] = field(default_factory=list)
    lengths: dict[int, tuple[list[Pdf], Pdf]] = field(default_factory=dict)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a set looks like as a sum of its clients."""

    name: str
    clients: int
    mean_per_s: float
    busiest_to_mean: float  # of ten-minute windows
    largest_share: float
    cv: float  # weighted by rate


def is_servegen(path: Path) -> bool:
    """Whether a tar holds rate files."""
    return next(files.members(path, "-trace.csv"), None) is not None


def load(path: Path, tally: Tally, with_lengths_of: str = "") -> dict[str, list[Client]]:
    """Every set's clients, by the set's folder name; length distributions, which are large, only of the set named."""
    sets: dict[str, dict[str, Client]] = {}
    for member, content in files.members(path, ""):
        name = PurePosixPath(member)
        client_name, _, kind = name.stem.rpartition("-")
        client = sets.setdefault(name.parent.name, {}).setdefault(client_name, Client(client_name))
        if kind == "trace":
            client.windows.extend(_windows(content, member, tally))
        elif kind == "dataset" and name.parent.name == with_lengths_of:
            client.lengths.update(_lengths(content, member, tally))
    found = {name: [one for one in clients.values() if one.windows] for name, clients in sets.items()}
    return {name: clients for name, clients in sorted(found.items()) if clients}


def _windows(content: bytes, member: str, tally: Tally) -> Iterator[Window]:
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        try:
            start, rate, cv, family, shape, _ = line.split(",")
            window = Window(float(start), float(rate), float(cv), family, float(shape))
            if not (0 <= window.rate_per_s < 1e9 and 0 <= window.cv < 1e6):
                raise ValueError(f"a rate of {rate} with a CV of {cv}")
            if window.rate_per_s and family not in ("Gamma", "Weibull"):
                raise ValueError(f"gaps of an unknown family {family!r}")
        except ValueError as error:
            tally.add(number, f"{member}: {error}")
        else:
            yield window


def _lengths(content: bytes, member: str, tally: Tally) -> dict[int, tuple[list[Pdf], Pdf]]:
    found = {}
    try:
        for start, named in msgspec.json.decode(content, type=dict[int, dict[str, str]]).items():
            wanted = {name: text for name, text in named.items() if name in (*INPUTS, "output_tokens") and text != "{}"}
            if wanted:  # a window without requests has none
                pdfs = {name: _pdf(text) for name, text in wanted.items()}
                found[start] = ([pdfs[name] for name in INPUTS if name in pdfs], pdfs["output_tokens"])
    except (KeyError, SyntaxError, ValueError) as error:
        tally.add(1, f"{member}: {error}")
    return found


def _pdf(text: str) -> Pdf:
    """A Python dict in a string: tokens to probability."""
    pairs = ast.literal_eval(text)
    if not isinstance(pairs, dict) or not pairs:
        raise ValueError("a length distribution that is not a mapping")
    weights = np.array(list(pairs.values()), dtype=float)
    return np.array(list(pairs), dtype=np.int64), weights / weights.sum()


def rates(name: str, clients: list[Client]) -> Rates:
    """A set's figures."""
    means = np.array([np.mean([window.rate_per_s for window in client.windows]) for client in clients])
    totals: dict[float, float] = {}
    weighted = whole = 0.0
    for client in clients:
        for window in client.windows:
            totals[window.start_s] = totals.get(window.start_s, 0.0) + window.rate_per_s
            weighted += window.rate_per_s * window.cv
            whole += window.rate_per_s
    busiest = max(totals.values())
    mean = float(np.mean(list(totals.values())))
    return Rates(
        name=name,
        clients=len(clients),
        mean_per_s=mean,
        busiest_to_mean=busiest / mean if mean else 0.0,
        largest_share=float(means.max() / means.sum()) if means.sum() else 0.0,
        cv=weighted / whole if whole else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn from a set."""

    seed: int
    start_s: float
    duration_s: float
    rate_per_s: float  # of all clients together, on the mean; their shares and gaps stay
    request_class: ClassName = "chatbot+"
    lengths: Trace | None = None  # for a set that has none


def draw(name: str, clients: list[Client], wanted: Draw) -> Trace:
    """Requests of `duration_s`, a user a client. Raises TraceError where the set has no lengths and none are given.

    In a set that has some, clients without are left out and counted."""
    usable = clients if wanted.lengths else [client for client in clients if client.lengths]
    without, clients = len(clients) - len(usable), usable
    if not clients:
        raise TraceError(f"{name} has no lengths: name a trace to take them from (--lengths)")
    mean = sum(_mean_rate(client, wanted) for client in clients)
    if not mean:
        raise TraceError(f"{name} is silent from {wanted.start_s:g} s for {wanted.duration_s:g} s")
    if wanted.rate_per_s * wanted.duration_s > ROWS_MAX:
        raise TraceError(f"over {ROWS_MAX} requests would be drawn")
    rng, factor = np.random.default_rng(wanted.seed), wanted.rate_per_s / mean
    rows = [row for client in clients for row in _rows(client, wanted, factor, rng)]
    header = Header(source=SOURCE, licence=LICENCE).noting(
        seed=wanted.seed,
        duration_s=wanted.duration_s,
        start_s=wanted.start_s,
        set=name,
        clients_without_lengths=without,
    )
    if not rows:
        raise TraceError("no request falls into the duration: raise --rate or --duration")
    return Trace(header, tuple(sorted(rows, key=lambda row: row.timestamp or 0.0)))


def _mean_rate(client: Client, wanted: Draw) -> float:
    """Over the drawn span; each window counts by how much of it is drawn."""
    end_s = wanted.start_s + wanted.duration_s
    spans = (
        (window.rate_per_s, min(end_s, window.start_s + WINDOW_S) - max(wanted.start_s, window.start_s))
        for window in client.windows
    )
    return sum(rate * span_s for rate, span_s in spans if span_s > 0) / wanted.duration_s


def _rows(client: Client, wanted: Draw, factor: float, rng: np.random.Generator) -> Iterator[Row]:
    for at_s in _arrivals(client, wanted, factor, rng):
        incoming, outgoing = _draw_lengths(client, wanted, wanted.start_s + at_s, rng)
        yield Row(
            timestamp=round(at_s * 1e3, 3),
            request_class=wanted.request_class,
            user=client.name.replace("chunk", "client"),
            input_length=max(1, incoming),
            output_length=max(1, outgoing),
        )


def _arrivals(client: Client, wanted: Draw, factor: float, rng: np.random.Generator) -> Iterator[float]:
    """A renewal process a window, from a random phase of its first gap."""
    for window in client.windows:
        begin = max(window.start_s, wanted.start_s)
        end = min(window.start_s + WINDOW_S, wanted.start_s + wanted.duration_s)
        if end <= begin or not window.rate_per_s:
            continue
        at = begin + _gap_s(window, factor, rng) * rng.random()
        while at < end:
            yield at - wanted.start_s
            at += max(1e-6, _gap_s(window, factor, rng))


def _gap_s(window: Window, factor: float, rng: np.random.Generator) -> float:
    mean_s = 1.0 / (window.rate_per_s * factor)
    if window.family == "Weibull" and window.shape > 0:
        return mean_s * float(rng.weibull(window.shape)) / math.gamma(1.0 + 1.0 / window.shape)
    shape = 1.0 / max(window.cv, 1e-3) ** 2
    return float(rng.gamma(shape, mean_s / shape))


def _draw_lengths(client: Client, wanted: Draw, at_s: float, rng: np.random.Generator) -> tuple[int, int]:
    if wanted.lengths is not None:
        row = wanted.lengths.rows[int(rng.integers(len(wanted.lengths.rows)))]
        return row.input_length, row.output_length
    starts = [start for start in client.lengths if start <= at_s]
    parts, output = client.lengths[max(starts) if starts else min(client.lengths)]
    return sum(_pick(part, rng) for part in parts), _pick(output, rng)


def _pick(pdf: Pdf, rng: np.random.Generator) -> int:
    values, weights = pdf
    return int(values[min(len(values) - 1, int(np.searchsorted(np.cumsum(weights), rng.random())))])
