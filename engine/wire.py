"""What router and worker say to each other: length-prefixed msgpack, one frame an engine step.

Owns the message shapes and the framing. Never owns a socket; only relative seconds cross (each side stamps its own
clock on read). Ids cross as raw little-endian int32. A worker says Hello first; the router answers Welcome."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1
FRAME_MAX_BYTES: Final = 16 * 1024 * 1024  # a 1M-token prompt is 4 MiB; anything larger is a broken peer

_LENGTH = struct.Struct("<I")


class WireError(Exception):
    """The peer sent what no correct peer sends: a frame too large, undecodable, or of another protocol."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages; array-like, so that a frame carries no field names."""


# Worker to router ----------------------------------------------------------------------------------------------------


class StepModelParts(Message, frozen=True):
    """policies.costs.StepModel on the wire."""

    floor_s: float
    row_s: float
    base_s: float
    decode_context_s: float
    chunk_context_s: float
    sequence_s: float
    bias: float
    q90: float
    version: int


class Hello(Message, frozen=True, tag="hello"):
    """The worker introduces itself. `cached` is its snapshot of resident chain keys, 16 bytes each."""

    protocol: int
    worker: str  # "w0"; stable over restarts
    epoch: int  # differs after every restart
    model: str
    model_digest: str
    device: str
    block_tokens: int
    blocks_total: int
    context_max: int
    vocab_size: int
    root: bytes  # engine.kv.keys.root of what it computes
    policy_digest: str
    step_model: StepModelParts
    cached: bytes
    nonce: bytes  # on TCP the router proves the shared secret over this
    weights_version: int = 0  # as the last UpdateWeights said
    asleep: int = 0  # as the last Sleep said; 0: awake


class TierLoad(Message, frozen=True):
    """The tiers below the device: blocks that lie there now, and counts of blocks since the start."""

    block_bytes: int = 0
    host_blocks: int = 0
    host_blocks_max: int = 0
    stored: int = 0  # written through to the host pool
    skipped: int = 0  # not written through, for want of room or time
    restored_host: int = 0
    restored_disk: int = 0
    missed: int = 0  # promised, but torn, overwritten, corrupt or given up
    disk_blocks: int = 0
    disk_written: int = 0
    disk_dropped: int = 0  # not written: too many waited, or the disk refused
    disk_corrupt: int = 0
    pinned_bytes: int = 0  # of the pool, registered with the device for copies at its link's full speed


class Load(Message, frozen=True):
    """The common part of a frame, the same for every link."""

    running: int
    waiting: int
    waiting_uncached_tokens: int
    blocks_free: int
    blocks_cached: int
    decode_context: int
    step_s: float
    steps: int  # counts up: progress is the only proof of health
    oldest_running_s: float
    tiers: TierLoad = TierLoad()
    repairs: int = 0  # times that the worker found its block accounts wrong and started its cache over
    joules: list[float] = []  # since it started, attributed: by class, then idle; empty where nothing counts them
    asleep: int = 0  # at which level; 0: awake
    preemptions: int = 0  # times that a sequence gave its KV up to a more urgent one
    parks: int = 0  # and because nobody read its stream


class Start(Message, frozen=True):
    """A sequence got its first token."""

    handle: int
    cached_tokens: int
    queued_s: float  # from submit to its first prefill chunk, by the worker's clock
    prefill_s: float


class End(Message, frozen=True):
    """A sequence ended; nothing more comes for its handle."""

    handle: int
    reason: str  # stop | length | abort | error | refused | invalid (the request cannot be served anywhere)
    cached_tokens: int
    output_tokens: int
    message: str = ""


class Scored(Message, frozen=True):
    """The log-probability of one token, as the model gave it before any setting, and of the likeliest ones there."""

    handle: int
    token: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class HintAck(Message, frozen=True):
    """What a hint's action came to."""

    message_id: str
    action_id: str
    status: str  # done | partial | nothing | unknown (no such session here) | unsupported (no such verb)
    blocks: int


class StepFrame(Message, frozen=True, tag="step"):
    """One engine step as one link sees it. Idle workers send one each 500 ms: it is heartbeat and load report too."""

    handles: list[int]
    counts: list[int]  # tokens for each handle
    ids: bytes  # int32, all handles' tokens in order
    starts: list[Start]
    ends: list[End]
    load: Load
    stored: bytes  # chain keys, 16 bytes each
    evicted: bytes
    step_model: StepModelParts | None
    scored: list[Scored] = []  # one for each token of the handles that asked, in order
    acks: list[HintAck] = []
    weights_version: int = 0  # by which its tokens were computed


# Router to worker ----------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The router's answer to Hello. `proof` is HMAC-SHA256(secret, nonce) on TCP, empty on a Unix socket."""

    protocol: int
    router: str
    policy: str  # PolicySpec JSON
    proof: bytes


class Sampling(Message, frozen=True):
    """How to choose each token. `temperature` 0 is greedy; the same seed gives the same random numbers."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0  # divides what a token of prompt or answer would score; over 1 is less of it
    presence_penalty: float = 0.0  # taken from each token of the answer once
    frequency_penalty: float = 0.0  # and this as often as it occurred
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1  # how many of the likeliest tokens are told beside the chosen one's; -1 tells none
    grammar_kind: str = ""  # json_schema | regex | lark; empty: any text
    grammar: str = ""
    prompt_logprobs: bool = False  # those of the prompt's tokens from its second on come before the first token's

    @property
    def has_penalties(self) -> bool:
        """Whether what was said already changes what comes next."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Submit(Message, frozen=True, tag="submit"):
    """One attempt of one request. `handle` is the router's, unique per link for ever: a late result of an old
    attempt names a handle that nobody knows any more, and is dropped."""

    handle: int
    ids: bytes  # prompt, then tokens already emitted by an earlier attempt
    prompt_len: int
    salt: bytes
    public_blocks: int
    request_class: int
    first_left_s: float  # until the first token is due; negative when late
    tpot_s: float  # inf: no pace promised
    deadline_left_s: float  # inf: none
    session: str
    sampling: Sampling
    call_ids: list[int] | None = None  # of which one begins any call of a tool; none: it cannot call; None: not known


class Abort(Message, frozen=True, tag="abort"):
    """Forget a handle: its blocks are free or cached within one step. Unknown handles are ignored."""

    handle: int
    reason: str


class HintAction(Message, frozen=True):
    """One wish for a session's KV: retain (`ttl_s`), release, demote, prefetch or supersede."""

    action_id: str
    verb: str
    salt: bytes
    session: str
    ttl_s: float = 0.0


class Hint(Message, frozen=True, tag="hint"):
    """What the router knows of KV that will, or will not, be needed. Each action is answered by one HintAck."""

    message_id: str
    actions: list[HintAction]


class Drain(Message, frozen=True, tag="drain"):
    """Take nothing new, finish what runs, then exit 0."""

    grace_s: float


class UpdateWeights(Message, frozen=True, tag="update_weights"):
    """Load a folder of the same model and compute with it from some step on. KV of the old weights is void; who runs
    goes on behind its tokens. Answered by Told."""

    request: int
    folder: str
    version: int


class SetPolicy(Message, frozen=True, tag="set_policy"):
    """Plan steps and keep blocks by this policy: a built-in name or `module:attribute`. Answered by Told."""

    request: int
    ref: str


class Sleep(Message, frozen=True, tag="sleep"):
    """Give memory back: at level 1 the device's KV, at level 2 the weights as well. What was written through to the
    pool stays there; who runs waits, and goes on behind its tokens after Wake. Answered by Told."""

    request: int
    level: int


class Wake(Message, frozen=True, tag="wake"):
    """End a Sleep. Answered by Told, once steps can be computed."""

    request: int


class Told(Message, frozen=True, tag="told"):
    """The worker's answer to an order about itself; `error` is empty when it was done."""

    request: int
    error: str = ""


Control = UpdateWeights | SetPolicy | Sleep | Wake
FromWorker = Hello | StepFrame | Told
FromRouter = Welcome | Submit | Abort | Hint | Drain | Control

_encoder = msgspec.msgpack.Encoder()
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_from_router: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)


def encode(message: Message) -> bytearray:
    """A message as bytes for the socket, length first. Raises WireError when it is over FRAME_MAX_BYTES.

    The buffer is the caller's own: making bytes of it would copy a long prompt's ids once more."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(message, buffer, _LENGTH.size)
    length = len(buffer) - _LENGTH.size
    if length > FRAME_MAX_BYTES:
        raise WireError(f"a frame of {length} bytes is over the limit of {FRAME_MAX_BYTES}")
    _LENGTH.pack_into(buffer, 0, length)
    return buffer


def decode_from_worker(frame: bytes | memoryview) -> FromWorker:
    """A worker's message. Raises WireError on anything else."""
    try:
        return _from_worker.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"undecodable frame from a worker: {error}") from error


def decode_from_router(frame: bytes | memoryview) -> FromRouter:
    """A router's message. Raises WireError on anything else."""
    try:
        return _from_router.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"undecodable frame from a router: {error}") from error


class FrameReader:
    """Cuts a byte stream into frames. Feed it what the socket gave; it keeps the unfinished rest."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._wanted = _LENGTH.size  # until the rest is this long nothing can complete: a large frame is joined once

    def feed(self, data: bytes) -> list[bytes]:
        """All frames completed by `data`. Raises WireError when one announces more than FRAME_MAX_BYTES."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        frames, at, end = [], 0, len(data)
        self._wanted = _LENGTH.size
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > FRAME_MAX_BYTES:
                raise WireError(f"a frame announces {length} bytes, the limit is {FRAME_MAX_BYTES}")
            if end - at - _LENGTH.size < length:
                self._wanted = _LENGTH.size + length
                break
            at += _LENGTH.size
            frames.append(data[at : at + length])
            at += length
        if at < end:
            self._rest += data[at:]
        return frames
