"""The engine's loop: orders in, one step, tokens out. It is the only thread that touches the scheduler and the device.

Owns the step model's fit and the heartbeat. Never touches a socket and never waits for one."""

from __future__ import annotations

import logging
import queue
from array import array
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from dataclasses import replace as replaced

from msgspec.structs import replace

from engine.compute.calibrate import GPU_SHAPES, SHAPES, calibrate
from engine.compute.masks import Grammar, MaskMaker
from engine.control import Control
from engine.energy import Energy
from engine.kv.blocks import BlockTrie
from engine.kv.keys import KEY_BYTES
from engine.kv.tiers import Tiers
from engine.outbox import Outbox
from engine.scheduling.outcome import Outcome
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculate import Speculator
from engine.step import Runner
from engine.wire import Abort, Drain, End, Hello, Hint, StepFrame, StepModelParts, Submit
from engine.wire import Control as ControlOrder
from policies.costs import StepFit, StepModel

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
BLOCKED_WAIT_S = 0.02  # how long to wait for a link to drain when every sequence's link is full
SNAPSHOT_KEYS_MAX = 500_000  # 8 MB of the hello's 16


@dataclass(frozen=True, slots=True)
class Attach:
    """A link was opened; its outbox gets the hello first."""

    link: int
    outbox: Outbox


@dataclass(frozen=True, slots=True)
class Detach:
    """A link is gone, and with it whoever waited for its sequences."""

    link: int


@dataclass(frozen=True, slots=True)
class Order:
    """A router's message, with the local time at which it was read."""

    link: int
    message: Submit | Abort | Hint | Drain | ControlOrder
    read_at: float
    grammar: Grammar | None = None  # of a submit that asks for one, compiled where it was read
    refused: End | None = None  # or why it could not be


@dataclass(frozen=True, slots=True)
class Wake:
    """A copy has ended: there may be something to go on with."""


Command = Attach | Detach | Order | Wake


class Inbox:
    """Commands from the socket's thread to the loop."""

    def __init__(self, capacity: int = 4096) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._capacity = capacity

    @property
    def is_full(self) -> bool:
        """Whoever reads sockets stops reading while this holds."""
        return self._queue.qsize() >= self._capacity

    def put(self, command: Command) -> None:
        self._queue.put(command)

    def take(self, wait_s: float) -> list[Command]:
        """All commands there are; waits for the first."""
        commands = []
        try:
            commands.append(self._queue.get(timeout=wait_s) if wait_s > 0.0 else self._queue.get_nowait())
            while True:
                commands.append(self._queue.get_nowait())
        except queue.Empty:
            return commands


@dataclass(slots=True)
class News:
    """What the links do not know yet."""

    outcomes: list[Outcome] = field(default_factory=list)
    step_s: float = 0.0
    model: StepModelParts | None = None


class Core:
    """Made with everything it drives; `run` returns when drained."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        trie: BlockTrie,
        *,
        tiers: Tiers | None = None,
        fit: StepFit,
        hello: Hello,  # without snapshot
        inbox: Inbox,
        clock: Callable[[], float],
        control: Control,
        speculator: Speculator | None = None,
        energy: Energy | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._trie = trie
        self._tiers = tiers or Tiers(trie)
        self._fit = fit
        self._hello = hello
        self._inbox = inbox
        self._clock = clock
        self._speculator = speculator
        self._energy = energy
        self._links: dict[int, Outbox] = {}
        self._steps = 0
        self._step_s = 0.0
        self._told_at = clock()
        self._wait_s = 0.0
        self._drain_until: float | None = None
        self._masks = MaskMaker()
        self._control = control

    @property
    def is_done(self) -> bool:
        """Drained: nothing runs and nothing new will be taken."""
        return self._drain_until is not None and self._scheduler.is_idle

    def calibrate(self, budget_s: float) -> StepModel:
        """Learn the device's speed from made-up steps; before the first request."""
        known = GPU_SHAPES if self._hello.device.startswith("cuda") else SHAPES
        shapes = tuple(shape for shape in known if shape.context + shape.chunk < self._hello.context_max)
        return calibrate(self._runner, self._fit, self._trie, budget_s, self._clock, shapes=shapes)

    def run(self) -> None:
        """Turn until drained."""
        while not self.is_done:
            self.turn()
        self._tiers.wait(self._clock())
        self._tiers.close()

    def turn(self) -> None:
        """Take orders, compute one step if there is one, tell the links."""
        news = News([self._obey(command) for command in self._inbox.take(self._wait_s)])
        for link, told in self._control.done(self._clock()):
            self._told_at = self._clock() - HEARTBEAT_S  # all links hear at once what has changed
            if outbox := self._links.get(link):
                outbox.tell(told)
        self._end_drain(news)
        self._tiers.poll(self._clock())
        news.outcomes.append(Outcome(acks=self._scheduler.hints.arrived()))
        has_stepped = self._step(news)
        now = self._clock()
        is_due = now - self._told_at >= HEARTBEAT_S
        if has_stepped or is_due or any(outcome.ends or outcome.acks for outcome in news.outcomes):
            self._tell(news, now)
        if has_stepped:
            self._wait_s = 0.0
        elif self._scheduler.is_idle or self._control.asleep:
            if self._scheduler.is_idle:
                self._scheduler.check_idle()
            self._wait_s = max(0.0, self._told_at + HEARTBEAT_S - now)
        else:
            self._wait_s = BLOCKED_WAIT_S

    def _step(self, news: News) -> bool:
        if self._control.asleep:
            return False
        started = self._clock()
        full = frozenset(link for link, outbox in self._links.items() if outbox.is_full)
        step = self._scheduler.launch(self._fit.model, started, full)
        if step is None:
            return False
        if self._energy:
            self._energy.computed(step, self._fit.model)
        masks = self._masks.start(step.grammars) if step.grammars else None
        batch = replaced(step.batch, masks=masks) if masks else step.batch
        drafted = self._speculator.draft(step, batch, self._fit.model) if self._speculator else None
        result = self._runner.run(drafted.batch if drafted else batch)
        if drafted and self._speculator:
            result = self._speculator.judge(step, drafted, result)
        if masks:
            result = step.hold_back(masks.late, result)
        now = self._clock()
        news.outcomes.append(self._scheduler.collect(step, result, self._fit.model, now))
        self._steps += 1
        if len(result.ids):
            self._tiers.pin()
        # What residents wait: the host's share is in it, and so in the model. A step that began before it was asked for
        # took longer than the asking.
        self._step_s = max(now - started, result.seconds)
        changed = self._fit.observe(drafted.features if drafted else step.features, self._step_s)
        news.model = parts(changed) if changed else None
        return True

    def _obey(self, command: Command) -> Outcome:
        now = self._clock()
        match command:
            case Wake():
                pass
            case Attach(link, outbox):
                snapshot = self._tiers.resident_keys()[: SNAPSHOT_KEYS_MAX * KEY_BYTES]
                hello = replace(self._hello, step_model=parts(self._fit.published), cached=snapshot)
                outbox.open(self._control.introduce(hello))
                self._links[link] = outbox
                self._told_at = now - HEARTBEAT_S  # it gets its first load at once
            case Detach(link):
                del self._links[link]
                self._scheduler.drop_link(link, now)
            case Order(link, Submit(), refused=End() as refused):
                return Outcome(ends=[(link, refused)])
            case Order(link, Submit() as submit, read_at, grammar):
                if self._drain_until is None and not self._control.asleep:
                    return self._scheduler.submit(link, submit, read_at, grammar)
                state = "asleep" if self._control.asleep else "draining"
                return Outcome(ends=[(link, End(submit.handle, "refused", 0, 0, f"the worker is {state}"))])
            case Order(link, Abort(handle), _):
                return self._scheduler.abort(link, handle, now)
            case Order(link, Hint() as hint, _):
                return Outcome(acks=self._scheduler.hints.obey(link, hint, self._fit.model, now))
            case Order(_, Drain(grace_s), read_at):
                until = read_at + grace_s
                self._drain_until = until if self._drain_until is None else min(self._drain_until, until)
                log.info("draining, %.0f s at most", grace_s)
            case Order(link, control) if isinstance(control, ControlOrder):
                self._control.begin(link, control, now)
        return Outcome()

    def _end_drain(self, news: News) -> None:
        if self._drain_until is not None and self._clock() >= self._drain_until:
            news.outcomes.append(self._scheduler.abort_all(self._clock(), "the worker has no time left to drain"))

    def _tell(self, news: News, now: float) -> None:
        """One frame a link: its own sequences' tokens and ends, and what all links may know."""
        self._told_at = now
        load = self._scheduler.load(now, self._step_s, self._steps)
        if self._energy or self._control.asleep:
            joules = self._energy.read(now) if self._energy else []
            load = replace(load, joules=joules, asleep=self._control.asleep)
        stored, evicted = self._tiers.take_events()
        for link, outbox in self._links.items():
            handles = [handle for o in news.outcomes for handle in o.handles.get(link, ())]
            ids = array("i", [token for o in news.outcomes for token in o.ids.get(link, ())])
            frame = StepFrame(
                handles=handles,
                counts=[1] * len(handles),
                ids=ids.tobytes(),
                starts=[start for o in news.outcomes for to, start in o.starts if to == link],
                ends=[end for o in news.outcomes for to, end in o.ends if to == link],
                load=load,
                stored=stored,
                evicted=evicted,
                step_model=news.model,
                acks=[ack for o in news.outcomes for to, ack in o.acks if to == link],
                scored=[score for o in news.outcomes for to, score in o.scored if to == link],
                weights_version=self._control.weights_version,
            )
            outbox.add(frame)


def parts(model: StepModel) -> StepModelParts:
    """A step model as the wire carries it."""
    return StepModelParts(*astuple(model))
