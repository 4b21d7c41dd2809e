"""From a configuration to the keeper's plan: which commands prepare the model, run the workers and the router.

Owns the command lines between our own processes. Never starts one."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.host.keeper import Plan
from router.settings.config import KV, Config, Workers

# -P: a folder `engine` or `router` where the user happens to be must not be taken for ours.
PYTHON = (sys.executable, "-P", "-m")
GIB = 1024**3
POOL_PER_KV = 4  # of the workers' own KV: on a CPU both are the same memory, and the machine has other things to do
CGROUP_FILES = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def reread(path: Path | None, flags: Mapping[str, tuple[str, Any]]) -> tuple[str, ...]:
    """The command that reads the same sources once more, for SIGHUP."""
    source = ("--file", str(path.resolve())) if path is not None else ()
    return (*PYTHON, "router.settings.reread", *source, "--flags", json.dumps(flags), "--out", "{run}/config.json")


def make_plan(config: Config, env: Mapping[str, str], devices: Path = Path("/dev"), reread: Sequence[str] = ()) -> Plan:
    """What `headway serve` runs with this configuration."""
    if config.upstreams:
        return _upstream_plan(config, env, reread)
    gpus = _gpus(devices) if config.workers.device in ("auto", "cuda") else 0
    return Plan(
        host=config.server.host,
        port=config.server.port,
        admin_port=config.server.admin_port,
        drain_grace_s=config.server.drain_grace_s,
        config=config.to_json(),
        prepare=(*PYTHON, "engine", "convert", config.model.name),
        workers={f"w{number}": _worker(config, number, gpus) for number in range(_count(config, gpus))},
        router=(*PYTHON, "router", "--config", "{run}/config.json", "--model", "{model}"),
        env=_environment(config, env),
        pool_bytes=pool_bytes(config, gpus),
        serving=_count(config, gpus),
        reread=reread,
    )


def _upstream_plan(config: Config, env: Mapping[str, str], reread: Sequence[str]) -> Plan:
    """A router alone: no model to prepare, no worker, no engine library."""
    return Plan(
        host=config.server.host,
        port=config.server.port,
        admin_port=config.server.admin_port,
        drain_grace_s=config.server.drain_grace_s,
        config=config.to_json(),
        prepare=(),
        workers={},
        router=(*PYTHON, "router", "--config", "{run}/config.json"),
        env=_environment(config, env),
        serving=len(config.upstreams),
        reread=reread,
    )


def served_name(config: Config) -> str:
    """What clients call the model."""
    return config.model.served_as or Path(config.model.name).stem


def state_folder(config: Config, env: Mapping[str, str]) -> Path:
    """Where keys that must outlive a restart are kept."""
    if config.server.state_dir:
        return Path(config.server.state_dir).expanduser()
    return Path(env.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "headway"


def pool_bytes(config: Config, gpus: int) -> int:
    """The host pool's size. Its memory is only touched as KV comes to lie there."""
    if config.kv.host_gib is not None:
        return int(config.kv.host_gib * GIB)
    most = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, _cgroup_leaves() // 2)
    if gpus:
        return most
    return min(most, POOL_PER_KV * config.workers.count * config.workers.kv_mib * 1024 * 1024)


def _cgroup_leaves() -> int:
    """Bytes that this process's cgroup may still take; a very large number where none says."""
    limit = usage = ""
    for folder, limit_name, usage_name in CGROUP_FILES:
        with contextlib.suppress(OSError):
            limit, usage = (folder / limit_name).read_text().strip(), (folder / usage_name).read_text().strip()
            break
    return max(0, int(limit) - int(usage)) if limit.isdigit() and usage.isdigit() else 2**62


def _gpus(devices: Path) -> int:
    """Cards of this host, asked of the driver's files: the keeper loads no CUDA."""
    return len(list(devices.glob("nvidia[0-9]*")))


def _count(config: Config, gpus: int) -> int:
    """One worker a card, or as many cards as it takes: two would halve each other's KV. Where there are too few cards,
    the one worker says so."""
    return min(config.workers.count, max(1, gpus // config.workers.tensor_parallel)) if gpus else config.workers.count


def _worker(config: Config, number: int, gpus: int) -> tuple[str, ...]:
    name, workers = f"w{number}", config.workers
    place: tuple[str, ...] = ("--socket", f"{{run}}/{name}.sock", "--name", name, "--model-name", served_name(config))
    place += ("--pool-fd", "{pool}", "--pool-share", str(_count(config, gpus)))
    place += ("--policy", config.policy.engine)
    if config.kv.disk_dir:
        disk_bytes = int(config.kv.disk_gib * GIB) // _count(config, gpus)
        place += ("--disk-dir", config.kv.disk_dir, "--disk-bytes", str(disk_bytes))
    if workers.device == "fake":
        return (*PYTHON, "engine", "fake", *place)
    command = (*PYTHON, "engine", "worker", *place, "--model", "{model}", "--threads", str(workers.threads))
    if workers.tensor_parallel > 1:
        command += ("--tensor-parallel", str(workers.tensor_parallel))
    if workers.weights != Workers().weights:
        command += ("--weights", workers.weights)
    if config.kv.dtype != KV().dtype:
        command += ("--kv-dtype", config.kv.dtype)
    if gpus:
        return (*command, "--device", f"cuda:{number * workers.tensor_parallel}")
    device = "cpu" if workers.device == "auto" else workers.device
    return (*command, "--device", device, "--kv-bytes", str(workers.kv_mib * 1024 * 1024))


def _environment(config: Config, env: Mapping[str, str]) -> dict[str, str]:
    """The children import the code that this process was imported from, wherever they run."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(config.workers.threads),
        "PYTHONUNBUFFERED": "1",
    }
    # Huge pages under the weights: GEMMs of a decode step took 10-14 % less on CPU. Other C libraries ignore it.
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **env, **ours}
