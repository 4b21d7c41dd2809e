"""Small worlds for the tests of the mind: one place for defaults, so that a test names only what it is about.

Owns no assertion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from policies.actions import Action, Dispatch, Reject, WakeAt
from policies.api import Job, Output, Promise, Prompt
from policies.builtin import headway
from policies.chain import NO_CHAIN, sample
from policies.costs import StepModel
from policies.dispatcher import Dispatcher
from policies.events import Arrived, Offered, WorkerLoad, WorkerReport, WorkerUp
from policies.limits import Limits
from policies.request import Budget, Facts, Request, RequestClass, RequestId, Tenant, WorkerId

MODEL = "m"
BLOCK = 64
# An 8B-class model on one 80 GB GPU: 6 ms a step, 50 us a prefill token.
STEP_MODEL = StepModel(0.006, 50e-6, 0.0005, 52e-9, 1.3e-9, 1e-5, q90=1.25, version=1)
LOCAL = Tenant()
LIMITS = Limits(index_every_block=1)


def chain(name: str, blocks: int) -> bytes:
    """The keys of a prompt called `name`; a longer one of the same name extends it."""
    return b"".join(xxhash.xxh3_128_digest(f"{name}/{block}".encode()) for block in range(blocks))


def request(
    number: int = 0, *, arrived: float = 0.0, tenant: Tenant = LOCAL, session: str = "", **facts: Any
) -> Request:
    """A streamed chat request without tools, changed by `facts`."""
    outer = {
        name: facts.pop(name) for name in ("max_output", "declared_timeout_s", "model", "body_hash") if name in facts
    }
    asked = Request(
        id=RequestId(f"r{number}"),
        tenant=tenant,
        session=session,
        model=MODEL,
        facts=Facts(**{"stream": True, "has_session": bool(session), **facts}),
        arrived=arrived,
        body_bytes=4_000,
        estimated_tokens=1_000,
    )
    return replace(asked, **outer)


def job(
    number: int = 0,
    *,
    cls: RequestClass = RequestClass.CHATBOT,
    tokens: int = 1_000,
    keys: bytes = b"",
    ttft_s: float = 2.0,
    tpot_s: float = 0.04,
    patience_s: float = 30.0,
    output: float = 200.0,
    arrived: float = 0.0,
    tenant: Tenant = LOCAL,
    **changes: Any,
) -> Job:
    """A request that can be placed."""
    made = Job(
        request=request(number, arrived=arrived, tenant=tenant),
        request_class=cls,
        reason="test",
        prompt=Prompt(tokens, tokens, sample(keys, 1) if keys else NO_CHAIN),
        output=Output(output, output, output * 1.5),
        promise=Promise(Budget(ttft_s, tpot_s), patience_s),
    )
    return replace(made, **changes)


def up(worker: int = 0, **changes: Any) -> WorkerUp:
    """A worker says hello."""
    event = WorkerUp(WorkerId(worker), MODEL, BLOCK, blocks_total=4_000, context_max=131_072, step_model=STEP_MODEL)
    return replace(event, **changes)


def load(**changes: Any) -> WorkerLoad:
    """An idle worker's load."""
    return replace(WorkerLoad(0, 0, 0, 4_000, 0, 0, 0.01), **changes)


def report(worker: int = 0, **changes: Any) -> WorkerReport:
    """An idle worker's frame."""
    return replace(WorkerReport(WorkerId(worker), load()), **changes)


def dispatcher(*, limits: Limits = LIMITS, workers: int = 0, seed: int = 0, **params: Any) -> Dispatcher:
    """A mind with `workers` idle workers."""
    mind = Dispatcher(headway(params), limits, np.random.default_rng(seed))
    for worker in range(workers):
        mind.handle(up(worker), 0.0)
    return mind


def offer(mind: Dispatcher, asked: Request, *, tokens: int = 1_000, keys: bytes = b"") -> list[Action]:
    """Offer a request and give it its tokens at once; what was decided, WakeAt aside."""
    actions = mind.handle(Offered(asked), asked.arrived)
    actions += mind.handle(Arrived(asked.id, tokens, keys), asked.arrived)
    return [action for action in actions if not isinstance(action, WakeAt)]


def dispatched(actions: list[Action]) -> list[Dispatch]:
    """The placements among `actions`."""
    return [action for action in actions if isinstance(action, Dispatch)]


def rejected(actions: list[Action]) -> list[Reject]:
    """The refusals among `actions`."""
    return [action for action in actions if isinstance(action, Reject)]
