"""Fleets: the smallest number of replicas that keeps every promise, found by asking about a few sizes.

Owns the order of sizes and what is said about the answer. Never simulates: it is given a way to check a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from loadgen.report import aligned
from loadgen.search import Share, mark
from loadgen.traces import CLASSES, ClassName

SIZES_MAX = 18  # of one search: the plan's three neighbours, seven doublings up to 256, and as many halvings
REPLICAS_MAX = 256  # as many as `simulate` takes
WHY_MORE = "it keeps room free for each class's own bursts, where the policies let the others work"
WHY_SHORT = "so short a trace ends before its later turns are asked for; give it a longer one"
WHY_NONE = ": twice as many did not help, so what misses is not for want of them"
WHY_FEWER = "it takes the load and the held prefixes as spread evenly over the fleet"


class Checked(msgspec.Struct, frozen=True):
    """What became of the workload on a fleet of this size."""

    replicas: int
    is_pass: bool
    classes: dict[ClassName, Share]


Check = Callable[[int], Checked]


def search(check: Check, planned: int) -> list[Checked]:
    """The planned size and its neighbours, then halving or doubling until the edge is found; by size."""
    found = {size: check(size) for size in (planned - 1, planned, planned + 1) if size >= 1}
    while len(found) < SIZES_MAX and (size := _next(found)) is not None:
        found[size] = check(size)
    return [found[size] for size in sorted(found)]


def edge(found: Sequence[Checked]) -> tuple[int, int | None]:
    """The largest insufficient size below the smallest sufficient one (0: none is known), and that one."""
    best = min((one.replicas for one in found if one.is_pass), default=None)
    below = [one.replicas for one in found if not one.is_pass and (best is None or one.replicas < best)]
    return max(below, default=0), best


def _next(found: Mapping[int, Checked]) -> int | None:
    worst, best = edge(list(found.values()))
    if best is None:
        return min(REPLICAS_MAX, 2 * worst) if worst < REPLICAS_MAX and not _is_in_vain(found) else None
    return (worst + best) // 2 if best - worst > 1 else None


def _is_in_vain(found: Mapping[int, Checked]) -> bool:
    """Whether twice the replicas left the class that is furthest below what is wanted as far below it."""
    most = max(found)
    return most // 2 in found and _short(found[most]) >= _short(found[most // 2])


def _short(one: Checked) -> float:
    return max((share.wanted - share.met for share in one.classes.values()), default=0.0)


def text(found: Sequence[Checked], planned: int, busy: float) -> str:
    """A row a size, the answer, and why the closed form said another. `busy`: replicas that the work alone fills."""
    rows = [["replicas", *(f"{name} met %" for name in CLASSES), ""]]
    for one in found:
        shares = [one.classes.get(name) for name in CLASSES]
        cells = ["-" if s is None else f"{100 * s.met:.1f} ({100 * s.low:.1f} to {100 * s.high:.1f})" for s in shares]
        rows.append([str(one.replicas), *cells, mark(one.classes, one.is_pass)])
    return f"{aligned(rows)}\n\n{_answer(found, planned, busy)}"


def _answer(found: Sequence[Checked], planned: int, busy: float) -> str:
    worst, best = edge(found)
    if best is None:
        why = WHY_NONE if _is_in_vain({one.replicas: one for one in found}) else ""
        return f"no fleet that was tried suffices, up to {worst} replicas{why}"
    limit = f"smallest fleet that suffices: {best}" + (f" ({worst} {_how(found, worst)})" if worst else "")
    if best - worst > 1:
        limit = f"smallest fleet that suffices: {worst + 1} to {best}; the search ended after {SIZES_MAX} sizes"
    if worse := [one.replicas for one in found if not one.is_pass and one.replicas > best]:
        limit += f"; yet {', '.join(map(str, worse))} failed: too close to call, give it more --seeds"
    if best == planned:
        return f"{limit}, as the closed form says"
    if planned < best:
        return f"{limit}; the closed form asks for {best - planned} fewer: {WHY_FEWER}"
    why = WHY_SHORT if busy > best else WHY_MORE
    return f"{limit}; the closed form asks for {planned - best} more, its work alone for {busy:.2f}: {why}"


def _how(found: Sequence[Checked], size: int) -> str:
    missed = next(one for one in found if one.replicas == size)
    return "fails" if mark(missed.classes, is_pass=False) == "FAIL" else "misses by what may be chance: more --seeds"
