"""The scheduler: turns what the policy plans into a step the runner can compute, and its result into tokens and ends.

Owns every sequence of the worker from submit to end, and with the trie every block. Never computes, waits or sends;
time is an argument. Between `launch` and `collect` nothing else may be called: blocks are freed at collect only."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from msgspec import structs

from engine.compute.masks import Grammar
from engine.kv.blocks import BlockTrie, Reach
from engine.kv.keys import ChainKey
from engine.kv.tiers import Tiers
from engine.scheduling.hints import Hints
from engine.scheduling.holdings import Holdings
from engine.scheduling.launch import Launch
from engine.scheduling.memory import PeakMemory
from engine.scheduling.outcome import Outcome
from engine.scheduling.repeat import advance, run_length
from engine.scheduling.report import held
from engine.scheduling.room import GivingWay, Room
from engine.scheduling.sequence import WAITING, Sequence, fault, refusal, yields_first
from engine.scheduling.table import Table
from engine.scheduling.waiting import WaitingQueue
from engine.step import ModelFacts, StepResult
from engine.wire import End, Load, Submit
from policies.api import EnginePolicy
from policies.builtin import headway_engine
from policies.costs import StepModel
from policies.request import RequestClass
from policies.retention import CLASS_BANDS
from policies.step_plan import Bools, Chunk, PlanLimits, owe

log = logging.getLogger(__name__)

NOT_A_TOKEN = "the model's answer was not a number or not in its vocabulary"


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a worker takes on at once."""

    sequences_max: int = 256  # resident
    waiting_max: int = 1024  # beyond it a submit is refused
    heads_max: int = 32  # of each class's queue, shown to the planner: as many as it looks at
    preemptions_max: int = 2  # of one sequence, in favour of more urgent ones
    preempt_cooldown_s: float = 5.0
    output_guess_tokens: int = 128  # until a class has finished something
    ahead_tokens: int = 0  # KV reserved beyond a decode's next token: 1 lets a runner begin the step after


class Scheduler:
    """Hot: once a step. Budget 0.5 ms at 256 sequences, 0.3 ms at one; bench/step_host.py."""

    def __init__(
        self,
        trie: BlockTrie,
        facts: ModelFacts,
        limits: SchedulerLimits = SchedulerLimits(),
        plan_limits: PlanLimits = PlanLimits(),  # noqa: B008
        tiers: Tiers | None = None,
        *,
        policy: EnginePolicy | None = None,  # None: Headway's, within `plan_limits`
        is_strict: bool = True,
    ) -> None:
        self._trie = trie
        self._tiers = tiers or Tiers(trie)
        self._is_strict = is_strict  # a leak is a crash
        self._limits = limits
        self.plan_limits = plan_limits
        self._policy = policy or headway_engine(plan_limits)
        self._block_tokens = trie.block_tokens
        self._context_max = min(facts.context_max, trie.blocks_total * trie.block_tokens)
        self._facts = replace(facts, context_max=self._context_max)
        self._table = Table(limits.sequences_max, -(-self._context_max // trie.block_tokens))
        self._waiting = WaitingQueue(limits.waiting_max)
        self._sequences: dict[tuple[int, int], Sequence] = {}
        self._serial = 0
        self._owed = (0.0, 0.0, 0.0)
        self.hints = Hints(trie, self._tiers)
        self._holdings = Holdings(trie, self._tiers, self._table, self._policy.keep)
        self._memory = PeakMemory(limits.output_guess_tokens, trie.block_tokens)
        self.room = Room(
            trie, self._tiers, self._table, self._holdings,
            waiting=self._waiting, memory=self._memory,
            giving_way=GivingWay(limits.preemptions_max, limits.preempt_cooldown_s),
        )  # fmt: skip
        self.repairs = 0

    @property
    def context_max(self) -> int:
        """Tokens that one sequence can have here."""
        return self._context_max

    @property
    def is_idle(self) -> bool:
        return not self._sequences

    # Orders ----------------------------------------------------------------------------------------------------------

    def submit(self, link: int, order: Submit, now: float, grammar: Grammar | None = None) -> Outcome:
        """Take a sequence in, or end it at once with the reason why not."""
        if invalid := fault(order, self._facts):
            return Outcome(ends=[(link, End(order.handle, "invalid", 0, 0, invalid))])
        reason = refusal(order, self._facts)
        if (link, order.handle) in self._sequences:
            reason = "this handle is in use"
        if self._waiting.is_full:
            reason = reason or "the worker's queue is full"
        if reason:
            return Outcome(ends=[(link, End(order.handle, "refused", 0, 0, reason))])
        self._serial += 1
        sequence = Sequence(link, order, self._serial, self._facts, now=now, grammar=grammar)
        self._sequences[link, order.handle] = sequence
        if not sequence.needs_all_rows:
            found = self._trie.match(order.ids, order.salt, order.public_blocks)
            lower = self._tiers.find(found, order.ids, order.salt, order.public_blocks)
            sequence.uncached_estimate = max(1, sequence.length - (len(found) + len(lower.keys)) * self._block_tokens)
            sequence.reach = Reach(len(found), found[-1].serial) if found else Reach()
        self._waiting.add(sequence)
        return Outcome()

    def abort(self, link: int, handle: int, now: float) -> Outcome:
        """End a sequence; its blocks are free or cached on return. Unknown ones are ignored."""
        sequence = self._sequences.get((link, handle))
        return Outcome(ends=[self._end(sequence, "abort", now)]) if sequence else Outcome()

    def drop_link(self, link: int, now: float) -> None:
        """Nobody listens to this link any more."""
        for sequence in [s for s in self._sequences.values() if s.link == link]:
            self._end(sequence, "abort", now)

    def abort_all(self, now: float, message: str) -> Outcome:
        """End everything."""
        return Outcome(ends=[self._end(s, "abort", now, message) for s in list(self._sequences.values())])

    # A step ----------------------------------------------------------------------------------------------------------

    def launch(self, model: StepModel, now: float, full_links: frozenset[int] = frozenset()) -> Launch | None:
        """The next step, its blocks reserved; None if there is nothing to compute. Full links get no tokens."""
        self._tiers.poll(now)
        self._end_waits(now)
        residents = self._table.is_used.nonzero()[0]
        heads = self._waiting.heads(self._limits.heads_max, full_links)
        if not len(residents) and not heads:
            return None
        for sequence in heads:
            self._waiting.look_again(sequence, self._trie)
        view = self._table.view(residents, heads, full_links, self._owed)
        chosen = self._policy.plan(view, model, now)
        step = Launch(view, chosen, residents, self._table.at(residents) + heads, now)
        step.full_links = full_links
        self._reserve_decodes(step)
        closed: set[RequestClass] = set()
        for chunk in chosen.chunks:
            sequence = step.sequence(chunk.row)
            if sequence.row == WAITING and sequence.request_class in closed:
                continue  # the first that finds no room is not overtaken by its own class; residents go on
            if not self._launch_chunk(chunk, sequence, step, model):
                closed.add(sequence.request_class)
        self._launch_decodes(step)
        if step.build(self._table, self._block_tokens):
            return step
        if not closed or self._table.is_restoring.any():
            return None
        if self._tiers.lent:  # no prompt can go on in what copies leave of the memory
            self._tiers.reclaim(now)
            return self.launch(model, now, full_links)
        if self._table.count > 1:
            # Prompts that fill the memory together and none can go on: the last to come gives way.
            self.room.preempt(max(step.preemptable(), key=yields_first), step)
            return self.launch(model, now, full_links)
        return None

    def collect(self, step: Launch, result: StepResult, model: StepModel, now: float) -> Outcome:
        """Take a step's result: tokens out, blocks readable by others, ended sequences' blocks back."""
        self._table.advance(step.rows, step.tokens)
        self._table.emit(step.sampled_rows, result.ids, now)
        self._table.emit_more(step.sampled_rows, result.more, now)
        is_bad = result.is_bad | (result.ids < 0) | (result.ids >= self._facts.vocab_size)
        has_bad = bool(np.count_nonzero(is_bad))
        for at in sorted(set(is_bad.nonzero()[0].tolist()) - result.messages.keys()) if has_bad else ():
            self._tiers.forget(self._trie.forget(step.sampled[at].blocks, now))
        self._commit(step, now)
        if result.prompt_scores:
            step.hear_scores(result.prompt_scores)
        outcome = Outcome()
        if has_bad or result.scores or result.more or step.grammars:
            self._hear(step, result, is_bad, outcome, now)
        else:
            for sequence, reason in outcome.speak_plainly(step.sampled, result.ids.tolist(), now):
                self._memory.learn(sequence)
                outcome.ends.append(self._end(sequence, reason, now))
        self._owed = owe(step.plan, step.view, model, result.seconds, self.plan_limits)
        return outcome

    def _hear(self, step: Launch, result: StepResult, is_bad: Bools, outcome: Outcome, now: float) -> None:
        """Tokens one by one: some are bad, or come with scores, drafts or a grammar."""
        answers = zip(step.sampled, result.ids.tolist(), is_bad.tolist(), strict=True)
        for at, (sequence, token, bad) in enumerate(answers):
            if bad:
                stuck = result.messages.get(at, "")  # in its grammar, which is its client's
                end = self._end(sequence, "invalid" if stuck else "error", now, stuck or NOT_A_TOKEN)
                outcome.ends.append(end)
                continue
            reason = outcome.speak(sequence, at, token, result, now)
            if reason:
                self._memory.learn(sequence)
                outcome.ends.append(self._end(sequence, reason, now))
            elif sequence.grammar is not None and (stuck := sequence.step_grammar(token)):
                outcome.ends.append(self._end(sequence, "invalid", now, stuck))

    def run_length(self, step: Launch, model: StepModel) -> int:
        """How many equal decode steps `step` begins if no order comes; engine/scheduling/repeat.py."""
        return 1 if len(self._waiting) else run_length(step, self._table, self._trie, model)

    def repeat(self, step: Launch, ids: list[int], ends: list[float]) -> None:
        """All steps of a run but its last one, which is collected as ever. Each ended at one of `ends`."""
        if ends:
            advance(step, ids, ends, self._table, self._holdings, commit=self._commit)

    def load(self, now: float, step_s: float, steps: int) -> Load:
        """What the worker holds right now."""
        now_held = held(self._table, self._waiting, self._trie.counts(), now)
        return structs.replace(
            now_held, step_s=step_s, steps=steps, tiers=self._tiers.load(), repairs=self.repairs,
            preemptions=self.room.preemptions, parks=self.room.parks,
        )  # fmt: skip

    def renew(self, root: ChainKey, now: float) -> None:
        """The weights are others: all KV is void. Who runs keeps its tokens and computes their KV anew."""
        self.room.give_up_all(now)
        self._tiers.reclaim(now)  # what came up later would be the old weights' KV under the new root
        self._trie.root_key = root
        self._trie.reset(())

    def sleep(self, now: float) -> None:
        """The device's KV goes, once what is being written through lies in the pool. Who runs waits for `wake`."""
        self.room.give_up_all(now)
        self._tiers.wait(now)
        self._trie.reset(())
        self._tiers.is_asleep = True

    def wake(self) -> None:
        """The device's memory is there again: who was parked goes on, as far as the pool has it without computing."""
        self._tiers.is_asleep = False

    def obey(self, policy: EnginePolicy) -> None:
        """Plan and keep by another policy from the next step on."""
        self._policy = policy
        self._holdings.keep = policy.keep

    def check_idle(self) -> None:
        """With no sequence left, only copies hold blocks. A test fails of a leak, a worker starts over and counts."""
        assert not self._sequences
        if self._is_strict:
            self._trie.check()
        if self._trie.counts().held != self._tiers.lent:
            assert not self._is_strict, "blocks are held by nobody"
            self.repairs += 1
            log.error("blocks were held by nobody: the cache starts over")
            self._trie.reset(self._tiers.held)

    # Inside a launch -------------------------------------------------------------------------------------------------

    def _reserve_decodes(self, step: Launch) -> None:
        """A block for each decode that begins one; if none can be had, the least urgent and latest gives way."""
        for ahead in (self._limits.ahead_tokens, 0):
            needy = self._short_of_blocks(step, 1 + ahead)
            if len(needy) <= self._trie.available:
                break
        if not needy:
            return
        if len(needy) <= self._trie.available:
            sequences = [step.sequence(number) for number in needy]
            self._table.extend(sequences, self._trie.take(len(needy), step.now) or [])
            return
        for number in needy:
            sequence = step.sequence(number)
            if sequence.row == WAITING:
                continue  # it gave way to one before it
            if not self.room.make(1, sequence.request_class, step):
                self._tiers.reclaim(step.now)
            while not self._trie.available:
                self.room.preempt(max(step.preemptable(), key=yields_first), step)
            if sequence.row != WAITING:
                self._holdings.take(sequence, 1, step.now)

    def _short_of_blocks(self, step: Launch, tokens: int) -> list[int]:
        """Decodes whose blocks do not hold so many tokens more."""
        decodes = step.plan.decodes
        held = self._table.blocks[step.rows_of(decodes)] * self._block_tokens
        wanted = np.minimum(step.view.context[decodes] + tokens, self._context_max)
        short: list[int] = decodes[held < wanted].tolist()
        return short

    def _launch_chunk(self, chunk: Chunk, sequence: Sequence, step: Launch, model: StepModel) -> bool:
        """Reserve and enter a prompt chunk; False if there is no room for it. True also if it must wait a step."""
        if sequence.row == WAITING:
            if step.is_resident(chunk.row):
                return True  # preempted a moment ago
            if not self._admit(sequence, step, model):
                return False
            if sequence.row == WAITING or sequence.restore is not None:
                return True
        if not self._holdings.adopt(sequence):
            return True
        table, size = self._table, self._block_tokens
        context = int(table.context[sequence.row])
        tokens = min(chunk.tokens, sequence.length - context)
        missing = -(-(context + tokens) // size) - len(sequence.blocks)
        if missing > 0 and not self.room.make(missing, sequence.request_class, step):
            missing = self._trie.available
            tokens = min(tokens, (len(sequence.blocks) + missing) * size - context)
        if tokens <= 0:
            return False
        is_end = context + tokens == sequence.length
        if is_end and self._limits.ahead_tokens and sequence.length % size == 0 and missing < self._trie.available:
            missing += 1  # for the step after, which begins before this one's token is known
        self._holdings.take(sequence, max(missing, 0), step.now)
        if sequence.prefill_at < 0.0:
            sequence.prefill_at = step.now
        is_read_only = sequence.blocks[context // size].edge is not None  # a full hit: only its last row runs
        step.add_chunk(Chunk(chunk.row, tokens), sequence, context, is_read_only=is_read_only)
        step.twins += self._holdings.publish(sequence, context, tokens)
        return True

    def _launch_decodes(self, step: Launch) -> None:
        rows, decodes = step.decodes()
        contexts = self._table.context[rows]
        for at in ((contexts + 1) % self._block_tokens == 0).nonzero()[0].tolist():
            step.twins += self._holdings.publish(decodes[at], int(contexts[at]), 1)

    def _admit(self, sequence: Sequence, step: Launch, model: StepModel) -> bool:
        """Give a waiting sequence a row and what the cache has of it; False if there is no room even by preemption."""
        known = b"" if sequence.needs_all_rows else sequence.known.tobytes()
        found = self._trie.match(known, sequence.salt, sequence.public_blocks)
        if any(block.is_pending for block in found):
            return True  # in a step the first sequence leads, those behind it wait for its blocks
        rivals: list[Sequence] | None = None
        while not (self._table.has_row and self.room.fits(sequence, found)):
            rivals = self.room.victims(sequence.request_class, step) if rivals is None else rivals
            if not rivals:
                return False
            self.room.preempt(rivals.pop(0), step)
        self._waiting.remove(sequence)
        self._trie.hold(found)
        sequence.blocks = found
        if not sequence.has_yielded:
            sequence.cached_tokens = min(len(found) * self._block_tokens, sequence.prompt_len)
        self._table.add(sequence, min(len(found) * self._block_tokens, sequence.length - 1))
        self._bring_up(sequence, known, step, model)
        return True

    def _bring_up(self, sequence: Sequence, known: bytes, step: Launch, model: StepModel) -> None:
        """Have what lower tiers know of it copied to the device. It waits for that; nobody else does."""
        found = sequence.blocks
        lower = self._tiers.find(found, known, sequence.salt, sequence.public_blocks)
        make_room = partial(self.room.make, urgent=sequence.request_class, step=step)
        band = CLASS_BANDS[sequence.request_class]
        restore = self._tiers.bring_up(found, lower, band, make_room=make_room, model=model, now=step.now)
        if restore is None:
            return
        sequence.restore = restore
        self._table.is_restoring[sequence.row] = True
        if sequence.prefill_at < 0.0:
            sequence.prefill_at = step.now

    def _end_waits(self, now: float) -> None:
        """Sequences whose blocks have come, or are late, go on."""
        if not np.count_nonzero(self._table.is_restoring):
            return
        for sequence in self._table.at(np.flatnonzero(self._table.is_restoring)):
            if sequence.restore is None or not sequence.restore.is_awaited(now):
                sequence.restore = None
                self._table.is_restoring[sequence.row] = False
                self._holdings.adopt(sequence)

    # Inside a collect ------------------------------------------------------------------------------------------------

    def _commit(self, step: Launch, now: float) -> None:
        """What the step wrote may be read."""
        for sequence, index, twin in step.twins:
            self._holdings.replace(sequence, index, twin, now)
        step.twins.clear()
        self._tiers.store(self._trie.commit())

    def _end(self, sequence: Sequence, reason: str, now: float, message: str = "") -> tuple[int, End]:
        del self._sequences[sequence.link, sequence.handle]
        if sequence.row == WAITING:
            self._waiting.remove(sequence)
        else:
            self.hints.note(sequence)
            self._holdings.let_go(sequence, is_aborted=reason == "abort", now=now)
            self._table.remove(sequence)
        output_tokens = sequence.output_tokens
        return sequence.link, End(sequence.handle, reason, sequence.cached_tokens, output_tokens, message)
