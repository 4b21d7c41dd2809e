"""Prompts: token ids from block ids, so that lengths and shared prefixes are the trace's own; and who seems to send.

Owns synthesis and the costumes of real clients. Never sends the true class: the router has to find it."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadgen.traces import Row, Trace

# Ids that every vocabulary worth serving has, above the special and byte-level ones of the Llama and GPT-2 families.
ID_LOW, ID_HIGH = 1000, 40_000
WORDS = """
about above act add after again age air all also among and any area arm art ask away baby back ball bank base bear
beat bed been began best big bird black blood blue board boat body bone book both box boy bring brown build busy buy
call came can car care carry case cat catch cause check child city class clean clear close cold color come cook cool
copy corn cost count cover cross cry cut dance dark day dead deal death deep did die does dog done door down draw
dream dress drink drive drop dry each ear early earth east eat edge egg eight end enter equal even event ever every
exact eye face fact fair fall far farm fast fat favor fear feed feel feet few field fight fill final find fine fire
first fish five flat floor flow fly food foot for force form found four free fresh from front fruit full fun game gas
gave get girl give glad glass gold gone good got grand grass gray great green grew group grow guess had hair half hand
happy hard has hat have head hear heart heat heavy help her here high hill his hit hold hole home hope horse hot hour
house how huge human hunt hurry ice idea inch iron job join joy jump just keep key kill kind king knew know lady lake
land large last late laugh law lay lead learn least leave left leg less let level lie life lift light like line list
live local
""".split()  # noqa: SIM905  a list of 256 lines

# As recorded from the clients themselves; a stripped client keeps only what every HTTP library sends.
CLAUDE_CODE = {"user-agent": "claude-cli/2.1.197 (external, cli)"}
CODEX = {"user-agent": "codex_exec/0.169.0", "originator": "codex_exec"}
OPENAI_SDK = {"user-agent": "OpenAI/Python 3.54.0"}
STRIPPED = {"user-agent": "okhttp/5.1.0"}


@dataclass(frozen=True, slots=True)
class Costume:
    """What a request wears. Only streams can be timed by token."""

    headers: dict[str, str]
    is_stream: bool = True


@dataclass(frozen=True, slots=True)
class Dresser:
    """Dresses rows; `stripped_share` of sessions (and of bursts) lose every header that names their client."""

    stripped_share: float
    seed: int

    def is_stripped(self, row: Row) -> bool:
        """The same for all rows of a session, or of a burst (they share their first block)."""
        name = row.family or f"{row.user}/{row.hash_ids[:1]}"
        return _uniform(f"{self.seed}/stripped/{name}") < self.stripped_share

    def costume(self, row: Row) -> Costume:
        """A coding agent names its session, a headless one its nature, a script only its SDK; a stripped one nothing.

        A script does not stream, so it is timed by its end alone."""
        is_job = row.request_class == "data-processor"
        if self.is_stripped(row):
            return Costume(STRIPPED, is_stream=not is_job)
        if is_job:
            return Costume(OPENAI_SDK, is_stream=False)
        session = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.seed}/{row.family}"))
        if row.request_class == "background-agent":
            return Costume(CODEX | {"session-id": session})
        return Costume(CLAUDE_CODE | {"x-claude-code-session-id": session})


def prompt_ids(trace: Trace, index: int, seed: int) -> list[int]:
    """Exactly `input_length` token ids: each block's from its name, an unnamed tail's from the row's own number.

    A block's name is its id, and its session (or that of its caller) where ids are local to one."""
    row, size = trace.rows[index], trace.header.block_size
    scope = row.family if trace.header.hash_scope == "local" else ""
    named = _draw(_number(f"{seed}/blocks/{scope}"), row.hash_ids, size)
    tail = _draw(_number(f"{seed}/tails"), [index], max(0, row.input_length - named.size))
    ids: list[int] = np.concatenate([named, tail])[: row.input_length].tolist()
    return ids


def words(ids: list[int]) -> str:
    """As many words as ids, for dialects that take text alone: each is one token in vocabularies of GPT-2's kind.

    What the server counts, its template included, is reported beside what was meant."""
    return " ".join(WORDS[token % len(WORDS)] for token in ids)


def _draw(seed: int, numbers: list[int], count: int) -> npt.NDArray[np.uint64]:
    """`count` ids for each number, by position: splitmix64, which needs no state and is the same everywhere."""
    with np.errstate(over="ignore"):
        start = _mixed(np.array(numbers, dtype=np.uint64) + np.uint64(seed))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        drawn = _mixed(start[:, None] + steps[None, :])
    return (drawn % np.uint64(ID_HIGH - ID_LOW) + np.uint64(ID_LOW)).ravel()


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _uniform(name: str) -> float:
    return _number(name) / 2**64
