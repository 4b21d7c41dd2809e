"""How much memory this process may still take, so that a model that does not fit is refused before it is loaded.

Owns the reading of the system's figures. Allocates nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path

UNKNOWN_BYTES = 2**62  # where the system says nothing
CGROUPS = (  # folder, limit, used
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """What the machine has free or can free at once, within what the process's cgroup leaves."""
    machine = _fields("/proc/meminfo").get("MemAvailable:")
    return min(UNKNOWN_BYTES if machine is None else machine * 1024, *(_left(*names) for names in CGROUPS))


def give_back() -> None:
    """Return to the system what was freed: glibc keeps pieces of up to 32 MiB otherwise. Elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _left(folder: str, limit: str, used: str) -> int:
    """The cgroup counts cached files as used; they go when memory is asked for."""
    cached = _fields(f"{folder}/memory.stat")
    reclaimable = cached.get("inactive_file", 0) + cached.get("active_file", 0)
    return _number(f"{folder}/{limit}", UNKNOWN_BYTES) - max(0, _number(f"{folder}/{used}", 0) - reclaimable)


def _fields(path: str) -> dict[str, int]:
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {parts[0]: int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}


def _number(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return otherwise
