"""The router process: builds the parts, joins them, serves until told to stop. Started by the keeper.

Owns the wiring and the order of start and stop. Holds no behaviour of its own."""

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
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from policies.api import PolicySpec
from policies.events import PolicyFault, Started
from policies.plugins import PolicyError
from policies.request import Tenant
from router.access.accounts import Accounts
from router.access.keys import KeysError, check_reach, keys_path
from router.access.salts import Salts
from router.access.tenants import Tenants
from router.control.mind import Mind, clock_zero_s
from router.control.record import FORMAT, Header, Recorder, set_aside
from router.control.reducer import build, load_policy, loader, policy_spec
from router.delivery.order import RelayLimits, Services
from router.delivery.ports import Observer
from router.host.plan import served_name, state_folder
from router.language import canonical
from router.language.template import ChatTemplate
from router.language.text import Text
from router.language.vocabulary import Vocabulary
from router.listener import admin
from router.listener.app import App, House, Posts, generation, shape_of
from router.listener.readiness import Readiness
from router.listener.server import Listener
from router.parsers.voice import Voice
from router.settings.config import Config
from router.settings.reconfigure import Reconfigurer
from router.telemetry.metrics import GcPauses, Metrics, Reservations
from router.telemetry.receipts import Receipt, Receipts
from router.upstreams.fleet import Upstreams
from router.upstreams.forward import ForwardDesk, forwarding
from router.upstreams.metrics import UpstreamMetrics
from router.upstreams.relay import ForwardServices
from router.version import code_version
from router.workers.fleet import Fleet
from router.workers.kv_hints import KvHints

log = logging.getLogger("router")

BAD_START = 2  # what was configured cannot be had: a restart will not help
BROKEN = 70  # the mind failed: only a restart helps


@dataclass(frozen=True, slots=True)
class Place:
    """What the keeper hands a router."""

    listen: socket.socket
    admin: socket.socket
    workers: Sequence[tuple[str, str]]  # (name, path of its socket)
    model: Path | None  # the prepared model: its tokenizer and template are read here; upstreams need none
    restart: Callable[[str, int], None]  # ask the keeper to restart a worker; an epoch whose KV is void, or 0
    config: Path  # where the configuration lies, and a changed one when SIGHUP comes


@dataclass(frozen=True, slots=True)
class Observers:
    """All who hear how a request ended."""

    each: Sequence[Observer]

    def ended(self, receipt: Receipt) -> None:
        for observer in self.each:
            observer.ended(receipt)


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs."""

    mind: Mind
    computing: Fleet | Upstreams
    readiness: Readiness
    tenants: Tenants
    app: App
    operator: admin.Admin


def main(argv: Sequence[str] | None = None) -> int:
    """Serve. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each question to an upstream, one a second
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the workers' cores
    config = Config.from_json(arguments.config.read_bytes())
    workers = [worker.partition("=") for worker in arguments.worker]
    place = Place(
        listen=socket.socket(fileno=arguments.listen_fd),
        admin=socket.socket(fileno=arguments.admin_fd),
        workers=[(name, path) for name, _, path in workers],
        model=arguments.model,
        restart=lambda name, distrusted: _ask(arguments.keeper_fd, f"{name}={distrusted}" if distrusted else name),
        config=arguments.config,
    )
    try:
        return uvloop.run(serve(config, place))
    except (PolicyError, KeysError, OSError, canonical.RuleError) as error:
        log.error("the router cannot start: %s", error)
        return BAD_START


async def serve(config: Config, place: Place) -> int:
    """Build everything, serve until a signal, drain. Raises PolicyError or OSError when something cannot be had."""
    with contextlib.ExitStack() as stack:
        parts = _build(config, place, stack)
        public = Listener(parts.app.gate, parts.app.handle, shape=shape_of)
        operator = Listener(admin.gate, parts.operator.answer)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        reconfigurer = Reconfigurer(place.config, config, parts.mind, parts.readiness, parts.tenants)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reconfigurer.apply)
        running = asyncio.create_task(parts.computing.run())
        following = asyncio.create_task(parts.tenants.run())
        stopped = asyncio.create_task(stop.wait())
        try:
            await public.start(place.listen)
            await operator.start(place.admin)
            # What is here now stays for ever: the collector need not look at it again. Its pauses are exported.
            gc.collect()
            gc.freeze()
            # Every 700 objects is every 30 requests: 8-12 us of each, and nearly nothing here is cyclic.
            gc.set_threshold(10_000, 20, 50)
            await asyncio.wait((running, stopped, parts.mind.broken), return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                return BROKEN
            parts.readiness.is_draining = True
            log.info("draining for up to %g s", config.server.drain_grace_s)
            await public.drain(config.server.drain_grace_s)
            return 0
        finally:
            running.cancel()
            following.cancel()
            stopped.cancel()
            await public.close()
            await operator.close()
            await asyncio.gather(running, following, stopped, return_exceptions=True)


def _build(config: Config, place: Place, stack: contextlib.ExitStack) -> Parts:
    """From the configuration to parts that run; `stack` closes what they opened."""
    seed, faults = secrets.randbits(32), deque[PolicyFault]()
    policy = load_policy(config, faults, is_timed=True)
    reducer = build(config, policy, seed, loader(faults, is_timed=True))
    recorder = _recorder(config, seed, stack)
    mind = Mind(reducer, faults, recorder)
    stack.callback(mind.close)
    spec = policy_spec(config).to_json()
    mind.begin(Started(config.digest, code_version(), seed, spec, clock_zero_s()))
    fleet = Fleet(place.workers, mind, spec, engine=PolicySpec(config.policy.engine), restart=place.restart)
    tenants = _tenants(config)
    metrics, receipts = Metrics(), _receipts(config, stack)
    metrics.watch(fleet, lambda: mind.live_count, lambda: recorder.dropped_events if recorder is not None else 0)
    metrics.registry.register(stack.enter_context(GcPauses()))
    metrics.registry.register(Reservations(reducer.reservations))
    observers = Observers([receipts, metrics, tenants.accounts, *_tracing(config, place, stack)])
    upstreams = Upstreams(config.upstreams, os.environ, mind) if config.upstreams else None
    computing = upstreams or fleet
    readiness = Readiness(computing, policy, reducer.fleet.profile, tenants.local.tenant)
    hints = KvHints(fleet, tenants.local.salt)
    if upstreams is not None:
        metrics.registry.register(UpstreamMetrics(upstreams))
        forward = ForwardServices(mind, upstreams, observers, RelayLimits(), time.monotonic)
        posts: Posts = forwarding(partial(ForwardDesk, forward, tenants))
        metrics.watch_kept(forward.kept)
    else:
        assert place.model is not None, "own workers have a model"
        services = Services(mind, fleet, observers, RelayLimits(), time.monotonic)
        posts = generation(services, _text(config, place.model), tenants, hints)
        metrics.watch_kept(services.kept)
    house = House(
        models=computing.models,
        model=config.model.served_as if upstreams is not None else served_name(config),
        posts=posts,
        tenants=tenants,
        readiness=readiness.state,
        aliases=config.models.aliases,
    )
    operator = admin.Admin(
        metrics, fleet, receipts, hints, tenants=tenants, readiness=readiness.state, upstreams=upstreams
    )
    return Parts(mind, computing, readiness, tenants, App(house), operator)


def _tenants(config: Config) -> Tenants:
    """Who may call. Raises KeysError when the keys cannot be read, or others could come and need none."""
    state = state_folder(config, os.environ)
    accounts = Accounts(state / "usage.json", time.monotonic, time.time)
    accounts.load()
    local = Tenant(config.tenant.id, config.tenant.organisation)
    tenants = Tenants(keys_path(config), Salts.load(state / "salt.key"), local, accounts)
    check_reach(config)
    tenants.load()
    return tenants


def _text(config: Config, folder: Path) -> Text:
    template = ChatTemplate.load(folder)
    voice = Voice.of(template.source if template is not None else "", config.model.calls, config.model.thoughts)
    return Text(
        Vocabulary.load(folder),
        template,
        voice=voice,
        rules=canonical.load(config.model.canonical),
        refuses_media=config.model.on_media == "refuse",
    )


def _recorder(config: Config, seed: int, stack: contextlib.ExitStack) -> Recorder | None:
    record = config.record
    if not record.path:
        return None
    path = Path(record.path)
    set_aside(path)
    header = Header(FORMAT, 0, code_version(), seed, msgspec.Raw(config.to_json()))
    recorder = Recorder(path, header, segment_bytes=record.segment_mib * 1024 * 1024, segments_max=record.segments_max)
    stack.callback(recorder.close)
    return recorder


def _receipts(config: Config, stack: contextlib.ExitStack) -> Receipts:
    path = Path(config.receipts.path) if config.receipts.path else None
    receipts = Receipts(config.receipts.kept, path)
    stack.callback(receipts.close)
    return receipts


def _tracing(config: Config, place: Place, stack: contextlib.ExitStack) -> list[Observer]:
    """Nothing, unless somebody collects: then the SDK is imported, too."""
    if not config.telemetry.otlp_endpoint:
        return []
    from router.telemetry.tracing import Tracing, otlp

    host, port = place.listen.getsockname()[:2]
    tracing = Tracing(otlp(config.telemetry.otlp_endpoint), config.telemetry.service_name, host, port)
    stack.callback(tracing.close)
    return [tracing]


def _ask(keeper_fd: int, ask: str) -> None:
    os.write(keeper_fd, ask.encode() + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router", description="One router; `headway serve` starts it.")
    parser.add_argument("--config", type=Path, required=True, help="JSON that the keeper wrote")
    parser.add_argument("--model", type=Path, help="folder of the prepared model; not for upstreams")
    parser.add_argument("--listen-fd", type=int, required=True, help="bound socket for clients")
    parser.add_argument("--admin-fd", type=int, required=True, help="bound socket for the operator")
    parser.add_argument("--keeper-fd", type=int, required=True, help="pipe: workers to restart, NAME or NAME=EPOCH")
    parser.add_argument("--worker", action="append", default=[], metavar="NAME=SOCKET", help="may be repeated")
    return parser


if __name__ == "__main__":
    sys.exit(main())
