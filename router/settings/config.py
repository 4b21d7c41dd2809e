"""The configuration: every key, its default and the reason for it; a file, the environment and flags become one value.

Owns what may be configured, and no other file holds a default of it. Each part is handed its piece alone."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import Counter
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

CALL_FORMS = ("auto", "hermes", "llama", "mistral", "pythonic", "none")
THOUGHT_FORMS = ("auto", "think", "magistral", "none")
ON_MEDIA = ("replace", "refuse")
DEVICES = ("auto", "cpu", "cuda", "fake")
WEIGHTS = ("bf16", "fp8")
KV_DTYPES = ("bf16", "fp8")

KV_EVENTS = re.compile(r"tcp://[^/\s:]+:[0-9]{1,5}|tcp://\[[0-9a-fA-F:]+\]:[0-9]{1,5}|ipc://\S+")
UPSTREAMS_MAX = 64  # as many as there are workers
PRIORITIES = ("", "vllm", "sglang")
FORWARDED_ROUTES = frozenset(
    f"/v1/{name}"
    for name in (
        "chat/completions",
        "completions",
        "responses",
        "messages",
        "messages/count_tokens",
        "embeddings",
        "rerank",
        "score",
    )
)

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """Where clients and the operator reach Headway."""

    host: str = "127.0.0.1"  # closed by default: without keys no other address is served
    port: Port = 8080  # 0: any free one, printed at start
    admin_port: Port = 8081  # metrics, workers and receipts, always on 127.0.0.1
    state_dir: str = ""  # what must outlive a restart; empty: $XDG_STATE_HOME/headway
    keys_file: str = ""  # who may call, see `headway keys`; empty: keys.json in state_dir
    drain_grace_s: Seconds = 30.0  # as long as chatbot+ is patient; a longer answer is cut with an error, not silently


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """What is served."""

    name: str = "smollm2"  # the embedded model; else a GGUF file, a folder with safetensors, or org/name on the hub
    served_as: str = ""  # the name that clients use; empty: the model's own
    calls: str = "auto"  # how it writes tool calls: auto (by its template) | hermes | llama | mistral | pythonic | none
    # Rules for what clients change in their system prompts, and the model need not see; also module:function.
    canonical: tuple[str, ...] = ("claude-code-billing",)
    on_media: str = "replace"  # images and documents become words (a refused one ends its session) | refuse
    thoughts: str = "auto"  # how it marks its reasoning: auto | think | magistral | none


class Models(Struct, frozen=True, forbid_unknown_fields=True):
    """The names that clients may use."""

    # Pattern to model; empty: the one that is served. Agents ask for their vendor's models unless told otherwise.
    aliases: dict[str, str] = field(default_factory=lambda: {"claude-*": "", "gpt-*": ""})


class Workers(Struct, frozen=True, forbid_unknown_fields=True):
    """The engine processes of this host."""

    count: Annotated[int, Meta(ge=1, le=64)] = 2  # two show affinity and survive one death; 64 is what is measured
    threads: Count = 1  # of each: more processes beat more threads for a 135M model on few cores
    tensor_parallel: Annotated[int, Meta(ge=1, le=16)] = 1  # cards that one worker spreads its model over
    device: str = "auto"  # cuda where a card is, else cpu | cpu | cuda | fake: made-up tokens, to try clients
    weights: str = "bf16"  # of a GPU worker's layers; fp8: half the bytes and the time of a few rows, at an error
    kv_mib: Count = 512  # on a CPU: 11,650 tokens of the embedded model (45 KiB each); a GPU takes what is free


class Upstream(Struct, frozen=True, forbid_unknown_fields=True):
    """A foreign engine: an OpenAI-compatible server such as vLLM or SGLang."""

    url: Annotated[str, Meta(min_length=1)]  # http://HOST:PORT; a path before /v1 is kept
    name: str = ""  # for people; empty: host and port
    key_env: str = ""  # the variable that holds its key; it goes to this upstream alone
    models: dict[str, str] = field(default_factory=dict)  # name here to name there; empty: what it lists
    # Which of our routes it has; not set: those that its /openapi.json lists, else chat and completions.
    routes: tuple[str, ...] | None = None
    priority: str = ""  # vllm | sglang: send the class as `priority`, in that engine's polarity; empty: do not
    kv_events: str = ""  # tcp://HOST:PORT of its KV events (pip install 'headway[kv-events]'); empty: it has none
    concurrency: Count = 256  # requests there at one time; beyond it they wait here, in the order of their budgets

    @property
    def shown_name(self) -> str:
        """What people read in x-headway-worker, receipts and metrics."""
        return self.name or self.url.partition("://")[2].partition("/")[0]


class KV(Struct, frozen=True, forbid_unknown_fields=True):
    """What KV is on a card, and where it lies that the device has no room for: memory of this host, then its disk."""

    dtype: str = "bf16"  # of GPU workers; fp8: nearly twice the tokens in as many bytes, at an error (docs/gpu.md)
    host_gib: Annotated[float, Meta(ge=0)] | None = None  # not set: a quarter of RAM, within what the cgroup leaves
    disk_dir: str = ""  # a folder that may be emptied at any time; empty: no disk tier
    disk_gib: Annotated[float, Meta(gt=0)] = 16.0  # of all workers together


class Promise(Struct, frozen=True, forbid_unknown_fields=True):
    """What a class is promised; a key that is not set keeps the default that `policies/budget.py` explains."""

    ttft_s: Seconds | None = None  # to the first token ...
    ttft_per_prefill: Seconds | None = None  # ... plus so many times the unloaded prefill of the new tokens
    tpot_s: Seconds | None = None
    deadline_s: Seconds | None = None  # to the last token ...
    deadline_per_turn: Seconds | None = None  # ... plus so many times the unloaded turn
    patience_s: Seconds | None = None


class Classes(Struct, frozen=True, forbid_unknown_fields=True):
    """Promises by class."""

    chatbot: Promise = field(default_factory=Promise, name="chatbot+")
    background_agent: Promise = field(default_factory=Promise, name="background-agent")
    data_processor: Promise = field(default_factory=Promise, name="data-processor")


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """Which mind decides: a built-in name, an installed entry point, or `module:factory`."""

    ref: Annotated[str, Meta(min_length=1)] = "headway"
    engine: Annotated[str, Meta(min_length=1)] = "headway"  # the workers' half: how steps are filled and KV is kept
    params: dict[str, Any] = field(default_factory=dict)  # the policy's own, as it explains them


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds of the mind that a deployment may want to move; all of them are in `policies/limits.py`."""

    requests_max: Count = 16_384  # offered, waiting and running together; about 2 KB each, so 32 MB
    attempts_max: Annotated[int, Meta(ge=1, le=10)] = 3  # placements of one request
    index_every_block: Count = 1  # the embedded profile's 16-token blocks are few; 4 with blocks of 64


class Tenant(Struct, frozen=True, forbid_unknown_fields=True):
    """Who pays while there are no keys: whoever reaches the loopback address."""

    id: Annotated[str, Meta(min_length=1, max_length=64)] = "local"
    organisation: Annotated[str, Meta(min_length=1, max_length=64)] = "local"


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """A recording of all that the mind saw and decided, for `headway replay-events`. It holds no prompt text."""

    path: str = ""  # empty: none
    segment_mib: Count = 64  # about 200,000 events; then the next file begins
    segments_max: Count = 8  # then recording stops: a replay needs the beginning, so nothing older is thrown away


class Receipts(Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of requests that ended."""

    kept: Count = 1000  # in memory, for the admin listener; about 1 KiB each
    path: str = ""  # JSON lines; empty: none


class Telemetry(Struct, frozen=True, forbid_unknown_fields=True):
    """Traces. Nothing leaves this host unless an endpoint is named."""

    otlp_endpoint: str = ""  # such as http://127.0.0.1:4318/v1/traces
    service_name: str = "headway"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """All of it, frozen. Its digest opens recordings."""

    server: Server = field(default_factory=Server)
    model: Model = field(default_factory=Model)
    models: Models = field(default_factory=Models)
    workers: Workers = field(default_factory=Workers)
    upstreams: tuple[Upstream, ...] = ()  # foreign engines instead of own workers
    kv: KV = field(default_factory=KV)
    classes: Classes = field(default_factory=Classes)
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    tenant: Tenant = field(default_factory=Tenant)
    record: Record = field(default_factory=Record)
    receipts: Receipts = field(default_factory=Receipts)
    telemetry: Telemetry = field(default_factory=Telemetry)

    def to_json(self) -> bytes:
        """Canonical JSON: equal configurations are equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def from_json(cls, data: bytes) -> Config:
        """What `to_json` wrote, in another process of the same build."""
        return msgspec.json.decode(data, type=cls)

    @property
    def digest(self) -> str:
        """16 hex digits that name this configuration."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]


def contradictions(config: Config) -> list[tuple[str, ...]]:
    """What each key alone allows and the whole does not: the keys that have a part in it, the main one first; why."""
    found: list[tuple[str, ...]] = []
    if config.server.port and config.server.port == config.server.admin_port:
        found.append(("server.admin_port", "server.port", "must differ from server.port"))
    if (endpoint := config.telemetry.otlp_endpoint) and not is_web_url(endpoint):
        found.append(("telemetry.otlp_endpoint", f"{endpoint!r:.80} must be http://HOST:PORT/PATH or https://..."))
    if config.workers.device == "fake" and config.workers.tensor_parallel > 1:
        found.append(
            ("workers.device", "workers.tensor_parallel", "must not be fake with workers.tensor_parallel above 1")
        )
    if config.workers.weights == "fp8" and config.workers.device in ("cpu", "fake"):
        why = f"must not be fp8 with workers.device {config.workers.device}"
        found.append(("workers.weights", "workers.device", why))
    if config.kv.dtype == "fp8" and config.workers.device in ("cpu", "fake"):
        found.append(("kv.dtype", "workers.device", f"must not be fp8 with workers.device {config.workers.device}"))
    found += [("upstreams", why) for upstream in config.upstreams if (why := _unusable(upstream))]
    names = Counter(upstream.shown_name for upstream in config.upstreams)
    twice = (name for name, count in names.items() if count > 1)
    found += [("upstreams", f"two are called {name}; set `name`, or remove one") for name in twice]
    if len(config.upstreams) > UPSTREAMS_MAX:
        found.append(("upstreams", f"must be {UPSTREAMS_MAX} at most"))
    words = (
        ("model.calls", config.model.calls, CALL_FORMS),
        ("model.thoughts", config.model.thoughts, THOUGHT_FORMS),
        ("model.on_media", config.model.on_media, ON_MEDIA),
        ("workers.device", config.workers.device, DEVICES),
        ("workers.weights", config.workers.weights, WEIGHTS),
        ("kv.dtype", config.kv.dtype, KV_DTYPES),
    )
    found += [(key, f"must be one of {', '.join(known)}") for key, word, known in words if word not in known]
    return found


def _unusable(upstream: Upstream) -> str:
    if not _is_base_url(upstream.url):
        return f"{upstream.url!r} must be http://HOST:PORT or https://HOST:PORT"
    if upstream.priority not in PRIORITIES:
        return f"priority must be one of {', '.join(PRIORITIES)}, or empty"
    if upstream.kv_events and not KV_EVENTS.fullmatch(upstream.kv_events):
        return f"kv_events: {upstream.kv_events!r:.80} must be tcp://HOST:PORT or ipc://PATH"
    if unknown := sorted(set(upstream.routes or ()) - FORWARDED_ROUTES):
        return f"routes: {unknown[0]!r} is none of {', '.join(sorted(FORWARDED_ROUTES))}"
    return ""


def is_web_url(url: str) -> bool:
    """http or https, a host, and a port that can be one."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:  # brackets without an address in them, a port beyond 65535
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    return is_plain and has_port and parts.scheme in ("http", "https") and bool(parts.hostname)


def _is_base_url(url: str) -> bool:
    if not is_web_url(url):
        return False
    parts = urlsplit(url)
    return not (parts.username or parts.query or parts.fragment)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
