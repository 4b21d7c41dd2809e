"""Hints: what a router knows of KV that will, or will not, be needed; each is answered by what was done.

Owns the memory of sessions' branches. A hint is soft: it moves blocks between tiers or in the order of eviction, never
locks one (hard pins wedged workers elsewhere) and never takes room from a sequence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.kv.blocks import Block, BlockTrie
from engine.kv.copies import Restore
from engine.kv.tiers import Tiers
from engine.scheduling.sequence import Sequence
from engine.wire import Hint, HintAck, HintAction
from policies.costs import StepModel
from policies.retention import CLASS_BANDS, Band


@dataclass(frozen=True, slots=True)
class HintLimits:
    """What is remembered, and how much one hint may ask."""

    session_bytes_max: int = 64 * 1024 * 1024  # token ids of the sessions' last chains: 110 of 142k tokens each
    branches_max: int = 4  # of one session: its subagents, and what it turned away from
    lease_s_max: float = 300.0  # as for leases that the engine gives by itself


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain that a session has used: prompt and answer."""

    ids: bytes  # int32
    salt: bytes
    public_blocks: int
    band: Band


class Done(NamedTuple):
    """What a hint came to."""

    status: str  # done | partial | nothing | unknown (no such session) | unsupported (no such verb)
    blocks: int


SessionKey = tuple[bytes, str]  # the salt keeps one organisation from hinting at another one's KV


class Hints:
    """Called by the loop's thread, between steps."""

    def __init__(self, trie: BlockTrie, tiers: Tiers, limits: HintLimits = HintLimits()) -> None:
        self._trie = trie
        self._tiers = tiers
        self._limits = limits
        self._sessions: OrderedDict[SessionKey, list[Branch]] = OrderedDict()  # oldest first; newest branch last
        self._bytes = 0
        self._awaited: list[tuple[int, str, HintAction, Restore]] = []
        self._verbs: dict[str, Callable[[list[Branch], float, float], Done]] = {
            "retain": self._retain,
            "release": self._release,
            "demote": self._demote,
            "supersede": self._supersede,
        }

    # Sessions --------------------------------------------------------------------------------------------------------

    def note(self, sequence: Sequence) -> None:
        """A sequence ended: this is where its session stands."""
        if not sequence.session:
            return
        key = (sequence.salt, sequence.session)
        ids = sequence.known.tobytes()
        known = self._sessions.pop(key, [])
        branches = [branch for branch in known if not ids.startswith(branch.ids)]  # else it was continued
        branches.append(Branch(ids, sequence.salt, sequence.public_blocks, CLASS_BANDS[sequence.request_class]))
        self._sessions[key] = branches[-self._limits.branches_max :]
        self._bytes += _size(self._sessions[key]) - _size(known)
        while self._bytes > self._limits.session_bytes_max:
            _, oldest = self._sessions.popitem(last=False)
            self._bytes -= _size(oldest)

    # Orders ----------------------------------------------------------------------------------------------------------

    def obey(self, link: int, hint: Hint, model: StepModel, now: float) -> list[tuple[int, HintAck]]:
        """Do what can be done at once, and say what it was. A prefetch is answered when it has `arrived`."""
        acks: list[tuple[int, HintAck]] = []
        for action in hint.actions:
            branches = self._sessions.get((action.salt, action.session), [])
            if not branches:
                done = Done("unknown", 0)
            elif action.verb == "prefetch":
                restore = self._prefetch(branches[-1], model, now)
                if restore is not None:
                    self._awaited.append((link, hint.message_id, action, restore))
                    continue
                done = Done("nothing", 0)
            elif action.verb in self._verbs:
                done = self._verbs[action.verb](branches, action.ttl_s, now)
            else:
                done = Done("unsupported", 0)
            acks.append((link, HintAck(hint.message_id, action.action_id, *done)))
        return acks

    def _retain(self, branches: list[Branch], ttl_s: float, now: float) -> Done:
        """A lease on the newest branch. What is not on the device is not brought there: that is prefetch."""
        blocks = self._found(branches[-1])
        until = now + min(ttl_s, self._limits.lease_s_max)
        for block in reversed(blocks):
            self._trie.rank(block, block.band, max(block.lease_until, until), now)
        self._tiers.touch(blocks)
        return Done("done" if blocks else "nothing", len(blocks))

    def _release(self, branches: list[Branch], _: float, now: float) -> Done:
        """No lease any more: its class's band."""
        blocks = [block for block in self._found(branches[-1]) if block.lease_until > now]
        for block in reversed(blocks):
            self._trie.rank(block, block.band, 0.0, now)
        return Done("done" if blocks else "nothing", len(blocks))

    def _demote(self, branches: list[Branch], _: float, __: float) -> Done:
        """Off the device, as far as nobody uses it and a lower tier has it."""
        found, dropped = self._found(branches[-1]), 0
        for block in reversed(found):  # tails first: what another block stands behind, stays
            if not (self._tiers.holds(block.key) and self._trie.drop(block)):
                break
            dropped += 1
        return _extent(dropped, len(found))

    def _supersede(self, branches: list[Branch], _: float, now: float) -> Done:
        """A newer turn has replaced the older branches: what is theirs alone goes first, in the pool as well."""
        *old, newest = branches
        kept = {block.id for block in self._found(newest)}
        private = [block for branch in old for block in self._found(branch) if block.id not in kept]
        alone = [block for block in reversed(private) if not block.refs and block.children <= 1]
        for block in alone:
            self._trie.rank(block, Band.EXPIRED, 0.0, now)
        self._tiers.age(alone)
        branches[:] = [newest]
        self._bytes -= _size(old)
        return _extent(len(alone), len(private))

    def _prefetch(self, branch: Branch, model: StepModel, now: float) -> Restore | None:
        """Up to the device, in room that nobody holds."""
        found = self._found(branch)
        lower = self._tiers.find(found, branch.ids, branch.salt, branch.public_blocks)

        def has_room(blocks: int) -> bool:
            return blocks <= self._trie.available

        for block in found[-1:]:  # what the others continue is no room for them
            self._trie.pin(block)
        restore = self._tiers.bring_up(found, lower, branch.band, make_room=has_room, model=model, now=now)
        for block in found[-1:]:
            self._trie.unpin(block, now)
        return restore

    def arrived(self) -> list[tuple[int, HintAck]]:
        """Answers to the prefetches that have ended, beside their links."""
        if not self._awaited:
            return []
        ended = [each for each in self._awaited if each[3].is_done]
        self._awaited = [each for each in self._awaited if not each[3].is_done]
        return [
            (link, HintAck(message, action.action_id, *_extent(restore.arrived, len(restore.blocks))))
            for link, message, action, restore in ended
        ]

    def _found(self, branch: Branch) -> list[Block]:
        return self._trie.match(branch.ids, branch.salt, branch.public_blocks)


def _size(branches: list[Branch]) -> int:
    return sum(len(branch.ids) for branch in branches)


def _extent(blocks: int, asked: int) -> Done:
    return Done("nothing" if not blocks else "done" if blocks == asked else "partial", blocks)
