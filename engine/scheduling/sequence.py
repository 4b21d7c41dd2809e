"""One generation: its tokens, how far they are computed, the blocks that hold them, and when its next token is due.

Owns its token ids and its times. Never allocates a block or decides whether it runs: the scheduler does."""

from __future__ import annotations

import math

import numpy as np

from engine.compute.masks import Follower, Grammar, GrammarError
from engine.kv.blocks import Block, Reach
from engine.kv.copies import Restore
from engine.kv.keys import Ids
from engine.scheduling.habit import Habit
from engine.step import History, ModelFacts, Score
from engine.wire import Scored, Submit
from policies.request import RequestClass

PROMPT_SCORES_MAX = 65_536  # numbers told of one prompt: 1.2 MB of the 16 that a frame may have
WAITING = -1  # the row of a sequence that holds no KV


class Sequence:
    """Made once a submit; a preempted one waits again and recomputes what the cache has lost."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "call_ids",
        "deadline",
        "first_due",
        "grammar",
        "habit",
        "handle",
        "has_penalties",
        "ids",
        "length",
        "length_max",
        "length_min",
        "link",
        "pace_s",
        "parks",
        "preempted_at",
        "preemptions",
        "prefill_at",
        "prompt_len",
        "prompt_scores",
        "public_blocks",
        "reach",
        "request_class",
        "restore",
        "resumed_at",
        "row",
        "salt",
        "sampling",
        "serial",
        "session",
        "stop_ids",
        "submitted_at",
        "uncached_estimate",
    )

    def __init__(
        self, link: int, order: Submit, serial: int, facts: ModelFacts, *, now: float, grammar: Grammar | None = None
    ) -> None:
        prompt = np.frombuffer(order.ids, dtype="<i4")
        self.link = link
        self.handle = order.handle
        self.serial = serial  # arrival order
        self.length = len(prompt)
        self.ids: Ids = np.empty(self.length + min(order.sampling.max_tokens, 256), dtype=np.int32)
        self.ids[: self.length] = prompt
        self.prompt_len = order.prompt_len
        self.resumed_at = self.length  # what is beyond was generated here
        self.salt = order.salt
        self.session = order.session
        self.call_ids = order.call_ids
        self.public_blocks = order.public_blocks
        self.request_class = RequestClass(order.request_class)
        self.sampling = order.sampling
        self.has_penalties = order.sampling.has_penalties
        self.habit = Habit()
        self.grammar = Follower(grammar) if grammar is not None else None  # behind the tokens that are there
        ends_anyway = grammar is not None  # nothing may follow the end of its text
        is_eos_text = order.sampling.ignore_eos and not ends_anyway
        self.stop_ids = frozenset(order.sampling.stop_ids) | frozenset(() if is_eos_text else facts.eos_ids)
        self.length_min = order.prompt_len + (0 if ends_anyway else order.sampling.min_tokens)  # no stop before
        self.length_max = min(order.prompt_len + order.sampling.max_tokens, facts.context_max)
        # Relative seconds become local times here, where they were read.
        self.submitted_at = now
        self.pace_s = order.tpot_s
        self.deadline = now + order.deadline_left_s
        self.first_due = now + order.first_left_s
        self.blocks: list[Block] = []
        self.cached_tokens = 0  # prompt tokens that others had computed, until the first preemption
        self.uncached_estimate = self.length  # tokens to compute, as far as is known while it waits
        self.reach = Reach()  # what of it the trie had when last looked at
        self.prefill_at = -1.0  # when its first chunk was launched
        self.restore: Restore | None = None  # what it waits for
        # Of its prompt's tokens from the second on, where asked for and not told by an earlier attempt.
        is_scored = order.sampling.prompt_logprobs and self.resumed_at == order.prompt_len
        self.prompt_scores: list[Score] | None = [] if is_scored else None
        self.row = WAITING
        self.preemptions = 0
        self.preempted_at = -math.inf
        self.parks = 0

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer, those of earlier attempts included."""
        return self.length - self.prompt_len

    @property
    def has_called(self) -> bool | None:
        """Whether its answer calls a tool, as far as its tokens tell; None: they do not."""
        if not self.call_ids:
            return None if self.call_ids is None else False
        return bool(np.isin(self.ids[self.prompt_len : self.length], self.call_ids).any())

    @property
    def may_speculate(self) -> bool:
        """Whether its next tokens can be drafted: what depends on each token before it cannot be computed beside it."""
        return self.grammar is None and self.sampling.logprobs < 0 and not self.has_penalties

    @property
    def history(self) -> History:
        """All ids so far; valid until the next one."""
        return History(self.ids[: self.length], self.prompt_len)

    @property
    def needs_all_rows(self) -> bool:
        """Whether no cache can serve it: each row of its prompt has to be computed."""
        return self.prompt_scores is not None and len(self.prompt_scores) < self.prompt_len - 1

    def scored(self, token: int, score: Score) -> Scored:
        """A token's log-probabilities as the wire carries them."""
        return Scored(self.handle, token, *score)

    def take_prompt_scores(self) -> list[Scored]:
        """Those of its prompt's tokens, once."""
        scores, self.prompt_scores = self.prompt_scores or [], None
        return [self.scored(token, score) for token, score in zip(self.ids[1:].tolist(), scores, strict=False)]

    def step_grammar(self, token: int) -> str:
        """Its grammar goes over a token; why it cannot, empty if it can."""
        if self.grammar is None:
            return ""
        try:
            self.grammar.accept(token)
        except GrammarError as error:
            return f"the grammar could not go on: {error}"
        return ""

    @property
    def has_yielded(self) -> bool:
        """Whether it gave its KV up before: what it finds again, it once computed itself."""
        return bool(self.preemptions or self.parks)

    @property
    def known(self) -> Ids:
        """Its token ids so far: prompt and answer."""
        return self.ids[: self.length]

    def append(self, token: int) -> str | None:
        """One more token was generated; why the sequence ends with it, None if it goes on."""
        length = self.length
        if length == len(self.ids):
            self.grow()
        self.ids[length] = token
        self.length = length + 1
        return self.ending(token)

    def ending(self, token: int) -> str | None:
        """Why `token`, its newest, ends it; None if it does not."""
        if token in self.stop_ids and self.length >= self.length_min:
            return "stop"
        return "length" if self.length >= self.length_max else None

    def grow(self) -> None:
        """Room for twice as many ids."""
        grown = np.empty(self.length * 2, dtype=np.int32)
        grown[: self.length] = self.known
        self.ids = grown

    def extend(self, token: int, count: int) -> None:
        """The same token so many times, none of which ends the sequence."""
        length = self.length + count
        if length > len(self.ids):
            grown = np.empty(length * 2, dtype=np.int32)
            grown[: self.length] = self.known
            self.ids = grown
        self.ids[self.length : length] = token
        self.length = length

    def next_due(self) -> float:
        """When the next token is due by the line alone."""
        emitted = self.output_tokens
        by_pace = self.first_due + emitted * self.pace_s if emitted else self.first_due
        return min(by_pace, self.deadline)


def yields_first(sequence: Sequence) -> tuple[int, float, int]:
    """Of several, the one with the largest gives way: the least urgent class, then the last to come."""
    return int(sequence.request_class), sequence.submitted_at, sequence.serial


def fault(order: Submit, facts: ModelFacts) -> str:
    """What a client asked for that no worker of this model can do, in one sentence; empty if nothing."""
    sampling = order.sampling
    for name, ids in (("logit_bias", [token for token, _ in sampling.logit_bias]), ("stop id", sampling.stop_ids)):
        if any(not 0 <= token < facts.vocab_size for token in ids):
            return f"a {name} names a token outside the vocabulary of {facts.vocab_size}"
    if sampling.prompt_logprobs:
        if not facts.device.startswith("cpu"):
            return "log-probabilities of a prompt are computed by CPU workers alone"
        if order.prompt_len * (sampling.logprobs + 1) > PROMPT_SCORES_MAX or sampling.logprobs < 0:
            return f"a prompt may have {PROMPT_SCORES_MAX} log-probabilities, counting the likeliest ones"
    return ""


def refusal(order: Submit, facts: ModelFacts) -> str:
    """Why an order cannot be served, in one sentence; empty if it can."""
    tokens = len(order.ids) // 4
    if len(order.ids) % 4 or not 0 < order.prompt_len <= tokens:
        return "the prompt has no tokens, or its length is wrong"
    if not 0 <= order.request_class < len(RequestClass):
        return f"there is no class {order.request_class}"
    if tokens >= facts.context_max:
        return f"{tokens} tokens do not fit into a context of {facts.context_max}"
    if tokens - order.prompt_len >= order.sampling.max_tokens:
        return "nothing is left to generate"
    ids = np.frombuffer(order.ids, dtype="<i4")
    is_known = int(ids.min()) >= 0 and int(ids.max()) < facts.vocab_size
    return "" if is_known else f"a token id is outside the vocabulary of {facts.vocab_size}"
