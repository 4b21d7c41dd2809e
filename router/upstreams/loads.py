"""What a foreign engine says of its load: vLLM's and SGLang's Prometheus lines become three figures.

Owns the names of their metrics. An engine that has none is counted by what we sent it."""

from __future__ import annotations

import contextlib
import math
import re
from typing import NamedTuple

# vLLM and SGLang name the same three things; where several ranks report, sums and the fullest cache are meant.
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
CACHE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")

_LINE = re.compile(rb"^([a-z_]+:[a-z_]+)(?:\{[^}\n]*\})? +([0-9.eE+-]+)", re.MULTILINE)


class Load(NamedTuple):
    """How busy an engine is, others' requests included."""

    running: int
    waiting: int
    cache_share: float  # of its KV memory that is in use, 0 to 1


def read_load(metrics: bytes) -> Load | None:
    """The figures; None when these are not the metrics of an engine that we know."""
    seen: dict[str, list[float]] = {}
    for name, value in _LINE.findall(metrics):
        with contextlib.suppress(ValueError):  # no number: nothing was said
            number = float(value)
            seen.setdefault(name.decode(), []).append(number if math.isfinite(number) else 0.0)
    running = [sum(seen[name]) for name in RUNNING if name in seen]
    if not running:
        return None
    waiting = [sum(seen[name]) for name in WAITING if name in seen]
    cache = [max(seen[name]) for name in CACHE if name in seen]
    return Load(_count(running), _count(waiting), min(1.0, max(0.0, max(cache, default=0.0))))


def _count(sums: list[float]) -> int:
    most = max(sums, default=0.0)
    return int(min(max(most, 0.0), 1e6))
