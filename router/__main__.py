"""`python -m router`: the router process, as the keeper starts it. Builds every part and hands each its piece.

Owns the order of start and end. Never runs alone: the listening sockets and the run directory are the keeper's."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from msgspec import Raw
from starlette.types import ASGIApp

from policies.events import PolicyFault
from policies.request import Tenant
from router.admin import admin_app
from router.app import App, House
from router.asgi import answer
from router.cli import code_version
from router.config import Config
from router.exchange import Exchange
from router.fleet import Fleet
from router.metrics import GcPauses, Metrics
from router.mind import Mind
from router.plan import served_name
from router.readiness import Readiness
from router.receipts import Receipt, Receipts
from router.record import FORMAT, Header, Recorder
from router.reducer import build, load_policy, policy_spec
from router.relay import RelayLimits, Services
from router.salts import Salts
from router.server import Handler, Listener
from router.template import ChatTemplate
from router.text import Text
from router.tracing import Tracing
from router.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the keeper passes on: two listening sockets, and a pipe on which a worker's restart is asked for."""

    listen: int
    admin: int
    keeper: int


@dataclass(frozen=True, slots=True)
class Observers:
    """All who hear of a request's end."""

    heard_by: Sequence[Callable[[Receipt], None]]

    def ended(self, receipt: Receipt) -> None:
        for hear in self.heard_by:
            hear(receipt)


async def serve(config: Config, model: Path, sockets: Sequence[tuple[str, str]], fds: Descriptors) -> None:
    """Route until SIGTERM, then drain. Raises what broke the mind: the keeper starts the next router."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    seed, faults = secrets.randbits(32), deque[PolicyFault]()
    policy = load_policy(config, faults, is_timed=True)
    reducer = build(config, policy, seed)
    tenant = Tenant(config.tenant.id, config.tenant.organisation)
    with contextlib.ExitStack() as stack:
        recorder = _recorder(config, seed)
        if recorder is not None:
            stack.callback(recorder.close)
        mind = Mind(reducer, faults, recorder)
        stack.callback(mind.close)
        fleet = Fleet(sockets, mind, policy_spec(config).to_json(), restart=_asker(fds.keeper))
        metrics = Metrics()
        metrics.watch(fleet, lambda: mind.live_count, lambda: recorder.dropped_events if recorder is not None else 0)
        metrics.registry.register(stack.enter_context(GcPauses()))
        receipts = Receipts(config.receipts.kept, Path(config.receipts.path) if config.receipts.path else None)
        stack.callback(receipts.close)
        tracing = _tracing(config)
        if tracing is not None:
            stack.callback(tracing.close)
        readiness = Readiness(fleet, policy, reducer.fleet.profile, tenant)
        heard_by = [receipts.ended, metrics.ended, *([tracing.ended] if tracing is not None else [])]
        app = App(
            House(
                services=Services(mind, fleet, Observers(heard_by), RelayLimits(), time.monotonic),
                models=fleet.models,
                text=Text(Vocabulary.load(model), ChatTemplate.load(model)),
                model=served_name(config),
                salt=Salts.load(_salt_path()).of(tenant.organisation),
                tenant=tenant,
                readiness=lambda: (readiness.is_ready(), readiness.answer()),
            )
        )
        listener = Listener(app.gate, app.handle)
        admin = Listener(lambda _: 0, _handler(admin_app(metrics, fleet, receipts)))  # its routes take no body
        await listener.start(socket.socket(fileno=fds.listen))
        await admin.start(socket.socket(fileno=fds.admin))
        _freeze()
        connecting = asyncio.create_task(fleet.run())
        stopping = asyncio.create_task(stop.wait())
        try:
            ends: list[asyncio.Future[Any]] = [stopping, mind.broken, connecting]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            readiness.is_draining = True
            if stop.is_set():
                await listener.drain(config.server.drain_grace_s)
        finally:
            await listener.close()
            await admin.close()
            for task in (connecting, stopping):
                task.cancel()
            await asyncio.gather(connecting, stopping, return_exceptions=True)
        if mind.broken.done():
            mind.broken.result()


def _recorder(config: Config, seed: int) -> Recorder | None:
    record = config.record
    if not record.path:
        return None
    header = Header(FORMAT, 0, code_version(), seed, Raw(config.to_json()))
    return Recorder(
        Path(record.path), header, segment_bytes=record.segment_mib * 1024 * 1024, segments_max=record.segments_max
    )


def _tracing(config: Config) -> Tracing | None:
    telemetry = config.telemetry
    if not telemetry.otlp_endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(telemetry.otlp_endpoint)
    return Tracing(exporter, telemetry.service_name, config.server.host, config.server.port)


def _asker(keeper_fd: int) -> Callable[[str], None]:
    def ask(worker: str) -> None:
        os.write(keeper_fd, f"{worker}\n".encode())

    return ask


def _salt_path() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "headway" / "salt.key"


def _handler(app: ASGIApp) -> Handler:
    async def handle(exchange: Exchange) -> None:
        await answer(app, exchange)

    return handle


def _freeze() -> None:
    """What was made at start lives as long as we do: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the router until it is told to stop; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m router", description="The router process; `headway serve` runs it."
    )
    parser.add_argument("--config", type=Path, required=True, help="the configuration as JSON")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder, for its tokenizer and template")
    parser.add_argument("--worker", action="append", default=[], metavar="NAME=SOCKET", help="a worker; repeat it")
    for name in ("listen", "admin", "keeper"):
        parser.add_argument(f"--{name}-fd", type=int, required=True, help="a descriptor that the keeper passes on")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the workers' cores
    config = Config.from_json(arguments.config.read_bytes())
    sockets = [(name, path) for name, _, path in (pair.partition("=") for pair in arguments.worker)]
    fds = Descriptors(arguments.listen_fd, arguments.admin_fd, arguments.keeper_fd)
    uvloop.run(serve(config, arguments.model, sockets, fds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
