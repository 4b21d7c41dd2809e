"""Watch: what a Headway router's admin listener tells of its workers while a run goes on.

Owns the polling and the words. Never judges: a lost worker explains a dip, it excuses none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx
import msgspec

from loadgen.records import Incident

POLL_S = 1.0
INCIDENTS_MAX = 100  # of one run: a fleet that flaps says so soon enough
TIMEOUT_S = 5.0


class State(msgspec.Struct, frozen=True):
    """One worker as /workers shows it."""

    worker: str
    is_up: bool = True
    losses: int = 0
    lost_reason: str | None = None


States = Mapping[str, State]  # by worker


def changes(before: States, after: States) -> list[str]:
    """What happened between two looks; a worker that was lost and came back between them was still lost."""
    said = []
    for name, now in after.items():
        was = before.get(name, State(name, is_up=False, losses=now.losses))
        if now.losses > was.losses or (was.is_up and not now.is_up):
            reason = f" ({now.lost_reason})" if now.lost_reason and not now.is_up else ""
            said.append(f"worker {name} lost{reason}")
        if now.is_up and (not was.is_up or now.losses > was.losses):
            said.append(f"worker {name} {'up again' if now.losses else 'joined'}")
    return said + [f"worker {name} gone" for name in before if name not in after]


def read(shown: object) -> States:
    """/workers as states. Raises ValueError for what is none."""
    return {one.worker: one for one in msgspec.convert(shown, list[State])}


async def look(client: httpx.AsyncClient) -> States | None:
    """The workers now; None: it did not tell."""
    try:
        answer = await client.get("/workers")
        return read(answer.json()) if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


async def watch(url: str, now: Callable[[], float], found: list[Incident]) -> None:
    """Write into `found` until cancelled."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        known, is_told = await look(client), True
        while len(found) < INCIDENTS_MAX:
            await asyncio.sleep(POLL_S)
            seen = await look(client)
            at_s = round(now(), 1)
            if (seen is not None) != is_told:
                is_told = seen is not None
                found.append(Incident(at_s, f"{url} {'tells again' if is_told else 'stopped telling of its workers'}"))
            if seen is not None:
                told = [Incident(at_s, text) for text in changes(known or seen, seen)]
                found += told[: INCIDENTS_MAX - len(found)]
                known = seen


def check(url: str) -> None:
    """Raises ValueError where there is nothing to watch."""
    try:
        read(httpx.get(url.rstrip("/") + "/workers", timeout=TIMEOUT_S).raise_for_status().json())
    except (httpx.HTTPError, ValueError) as error:
        raise ValueError(f"{url} tells no workers: is it a Headway router's admin listener? ({error})") from error
